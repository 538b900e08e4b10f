"""No key of the schema is dead: each is read by typed code outside of the schema.

Every key's field is renamed in a copy of the package, and pyright says which reads of it then fail,
by the section's class: `optimizer.lr` is not taken to be read because something else has an `lr`.
Keys that are read by a name in a variable are listed, and seen to be read when sets are resolved.
Sections that share a class, or a base, share their readers. tests/sanity/test_examples.py has the
quick form, by name alone. Not covered: that what is read has the right effect.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gdpo_megatron.config.evaluation import EvalSetConfig
from gdpo_megatron.config.fields import DERIVED, keys_of
from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.evaluation.sets import resolve_sets

PACKAGE = Path(__file__).parents[2] / "gdpo_megatron"
PYRIGHT = Path(sys.executable).with_name("pyright")

USED_BY_THE_SCHEMA = {("AdvantageConfig", "preset")}
"""It fills the other keys when the section is built."""

READ_BY_NAME = {
    ("EvalSetConfig", name)
    for name in (
        *("prompt_key", "answer_key", "prompt_template", "system_prompt"),
        *("num_prompts", "samples_per_prompt", "exceed_tokens"),
        *("temperature", "top_p", "top_k", "max_completion_tokens", "stop"),
    )
}
"""evaluation/sets.py goes over them in a loop."""


def leaves(section: type, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """(path, class, field) of each key that is no section."""
    for name, key in keys_of(section).items():
        path = f"{prefix}{name}"
        if key.section is not None:
            yield from leaves(key.section, f"{path}.")
        elif path not in DERIVED:
            yield path, section, name


def rename_leaves(folder: Path) -> None:
    """Rename the fields of all sections in a copy of the config's modules, sections' own apart."""
    known = {name for root in (RLConfig, SFTConfig) for _, _, name in leaves(root)}
    for path in folder.glob("*.py"):
        lines = path.read_text().splitlines()
        for cls in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(cls, ast.ClassDef):
                continue
            for node in cls.body:
                if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                    continue
                if node.target.id in known and "Config" not in ast.unparse(node.annotation):
                    at = node.lineno - 1
                    lines[at] = lines[at].replace(node.target.id, f"renamed_{node.target.id}", 1)
        path.write_text("\n".join(lines) + "\n")


def failing_reads(folder: Path) -> set[tuple[str, str]]:
    """(class, field) of the reads that pyright finds no attribute for."""
    settings = {
        "include": ["gdpo_megatron"],
        "typeCheckingMode": "off",
        "reportAttributeAccessIssue": "error",
        "enableTypeIgnoreComments": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [str(PYRIGHT), "--pythonpath", sys.executable, "--outputjson", "-p", str(folder)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    reads = re.compile(r'Cannot access attribute "(\w+)" for class "(\w+)')
    return {
        (cls, name)
        for problem in json.loads(shown.stdout)["generalDiagnostics"]
        if "/gdpo_megatron/config/" not in problem["file"]
        for name, cls in reads.findall(problem["message"])
    }


@pytest.mark.full
@pytest.mark.skipif(not PYRIGHT.is_file(), reason="needs pyright (scripts/setup.sh dev)")
def test_every_key_is_read_by_code_that_knows_its_section(tmp_path: Path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "gdpo_megatron", ignore=ignored)
    rename_leaves(tmp_path / "gdpo_megatron/config")
    # A read that is taken away: the test has to see it.
    optimizer = tmp_path / "gdpo_megatron/policy/optimizer.py"
    optimizer.write_text(optimizer.read_text().replace("config.betas", "(0.9, 0.95)"))
    read = failing_reads(tmp_path)
    unread = {
        (cls.__name__, name)
        for root in (RLConfig, SFTConfig)
        for _, cls, name in leaves(root)
        if not any((base.__name__, name) in read for base in cls.__mro__)
    }
    assert unread == USED_BY_THE_SCHEMA | READ_BY_NAME | {("OptimizerConfig", "betas")}


def test_keys_that_are_read_by_name_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = {
        "run_dir": "run",
        "model": {"hf_path": "model"},
        "rewards": [{"name": "short", "type": "length"}],
        "eval": {"sets": [{"name": "one", "data": "one.jsonl"}]},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    config = load_config(RLConfig, path)
    read: set[str] = set()
    original = EvalSetConfig.__getattribute__

    def record(self: Any, name: str) -> Any:
        read.add(name)
        return original(self, name)

    monkeypatch.setattr(EvalSetConfig, "__getattribute__", record)
    resolve_sets(config)
    assert {name for _, name in READ_BY_NAME} <= read
    assert {name for _, cls, name in leaves(EvalSetConfig) if cls is EvalSetConfig} <= read
