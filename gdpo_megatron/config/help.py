"""The reference of all config keys, made from the schema: for `--help` and for the docs.

docs/configuration.md is written by `python tools/write_docs.py`.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING

from gdpo_megatron.config.fields import Key, show, walk
from gdpo_megatron.config.schema import RLConfig, SFTConfig

_INTRO = """\
# Configuration

A run is one YAML file. Every key can also be set on the command line, over the file:

```bash
gdpo-megatron train config.yaml --optimizer.lr 2e-6 --rollout.group_size=16
gdpo-megatron train config.yaml --rewards.format.weight 0.5   # a reward, by its name
gdpo-megatron eval config.yaml --eval.sets.aime.num_prompts 8   # so is an evaluation set
```

- A value on the command line is YAML (`null`, `true`, `[a, b]`); a string needs no quotes.
- `defaults: other.yaml` at the top of a file, relative to it, names a file that this one is laid
  over: mappings merge, lists (the rewards too) are replaced as a whole.
- A relative path starts at the folder of the config file that holds it; one given on the command
  line starts at the config file too.
- In the keys that hold a path (`run_dir`, `model.hf_path`, `model.tokenizer_path`, `data.train`,
  `data.eval`, `eval.sets[].data`), `$NAME`, `${NAME}` and `${NAME:-default}` are filled in from the
  environment; `$$` is a dollar sign.
- Types are strict: `"3"` is no int, `yes` is no boolean (YAML 1.2). An int will do for a float, and
  `1e-6` is a number. Unknown keys, keys given twice and values out of range are errors, all of them
  reported together.

This page is written from the code by `python tools/write_docs.py`.
"""


def describe(root: type, width: int | None = None) -> str:
    """Every key of `root` for a terminal: what to type, type, default and meaning.

    Args:
        root: class of the whole config.
        width: columns; default that of the terminal, 100 at most.
    """
    width = width or min(shutil.get_terminal_size().columns, 100)
    lines: list[str] = []
    for section, doc, keys in _sections(root):
        title = f"{section}: {doc}" if section else doc
        lines += ["", *textwrap.wrap(title, width, subsequent_indent="    "), ""]
        for path, key in keys:
            lines += textwrap.wrap(
                f"--{path.replace('[]', '.NAME')}  {key.allowed}; {_default(key)}",
                width,
                initial_indent="  ",
                subsequent_indent=" " * 8,
                break_on_hyphens=False,
            )
            indent = " " * 6
            lines += textwrap.wrap(key.doc, width, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines[1:]) + "\n"


def to_markdown(root: type) -> str:
    """Every key of `root` as one Markdown table per section, under `###` headings."""
    return "\n".join(_section_table(*parts) for parts in _sections(root))


def configuration_page() -> str:
    """The text of docs/configuration.md: `train` and `eval` in full, then where `sft` differs."""
    full = {section: (section, doc, keys) for section, doc, keys in _sections(RLConfig)}
    same: list[str] = []
    other: list[str] = []
    for parts in _sections(SFTConfig):
        if _section_table(*full.get(parts[0], ("", "", []))) == _section_table(*parts):
            same.append(f"`{parts[0]}`")
        else:
            other.append(_section_table(*parts))
    return "\n".join(
        [
            _INTRO,
            "## Keys of `train` and `eval`\n",
            to_markdown(RLConfig),
            "## Keys of `sft`\n",
            f"As above: {', '.join(same)}. These differ:\n",
            *other,
        ]
    ).replace("\n\n\n", "\n\n")


def _sections(root: type) -> Iterator[tuple[str, str, list[tuple[str, Key]]]]:
    """(section path, its documentation, its own keys), the top level first."""
    sections: dict[str, tuple[str, list[tuple[str, Key]]]] = {"": (root.__doc__ or "", [])}
    for path, key in walk(root):
        parent = path.rpartition(".")[0]
        if key.section is not None:
            doc = key.doc
            if key.is_optional_section:
                doc = f"{doc} May be null, the default."
            sections[path + "[]" * key.is_list_of_sections] = (doc, [])
        else:
            sections[parent][1].append((path, key))
    for path, (doc, keys) in sections.items():
        yield path, " ".join(doc.split()), keys


def _section_table(section: str, doc: str, keys: list[tuple[str, Key]]) -> str:
    heading = f"### `{section}`" if section else "### Top level"
    lines = [heading, "", doc, "", "| key | type | | meaning |", "|---|---|---|---|"]
    for _, key in keys:
        cells = (f"`{key.name}`", key.allowed, _default(key), key.doc)
        escaped = (cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells)
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join([*lines, ""])


def _default(key: Key) -> str:
    """`default 1e-6` as a config file would say it, or `required`."""
    if key.default is MISSING:
        return "required"
    if isinstance(key.default, str) and re.fullmatch(r"[A-Za-z][\w.-]*", key.default):
        return f"default {key.default}"
    return f"default {show(key.default)}"
