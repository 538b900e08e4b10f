"""What pydantic found wrong with a config, in the words of the schema: one line for each key.

optimizer.lr: "fast" is not allowed; needs float > 0
optimizer.learning_rate: unknown key; did you mean 'lr'?
rewards.format.type: missing; needs string
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gdpo_megatron.config.fields import Key, keys_of, show, walk
from gdpo_megatron.errors import did_you_mean

OTHER_NAMES: Mapping[str, str] = {
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "clip_grad": "max_grad_norm",
    "beta": "kl_coef",
    "epsilon": "clip_eps_low",
    "cliprange": "clip_eps_low",
    "epsilon_high": "clip_eps_high",
    "n": "group_size",
    "num_generations": "group_size",
    "n_samples_per_prompt": "group_size",
    "max_tokens": "max_completion_tokens",
    "max_new_tokens": "max_completion_tokens",
    "max_response_length": "max_completion_tokens",
    "tp": "tensor_model_parallel_size",
    "tp_size": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "pp_size": "pipeline_model_parallel_size",
    "dtype": "params_dtype",
    "model_path": "hf_path",
    "model_name_or_path": "hf_path",
    "output_dir": "run_dir",
    "max_steps": "num_steps",
    "save_steps": "save_interval",
    "eval_steps": "eval_interval",
    "ppo_mini_batch_size": "num_minibatches_per_step",
    "reward_weights": "weight",
}
"""What other code bases call our keys; only ever used for a hint."""


def explain(root: type, data: Mapping[str, Any], error: ValidationError) -> list[str]:
    """Say each problem in one line, in the order of the schema.

    Args:
        root: class of the whole config.
        data: what was checked.
        error: what the check found.
    """
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        for path, line in _explain_one(root, data, detail):
            # A key with several problems (both items of a pair) is one line.
            lines.setdefault(path, line)
    return list(lines.values())


def _explain_one(root: type, data: Any, detail: ErrorDetails) -> Iterator[tuple[str, str]]:
    """Follow the error's location through schema and data; give (path, line) of what is there."""
    path, pattern, allowed, value = "", "", "sections", data
    section, location = root, list(detail["loc"])
    while location and section is not None:
        name = str(location.pop(0))
        parent, pattern = pattern, _join(pattern, name)
        path = _join(path, name)
        key = keys_of(section).get(name)
        if key is None:
            yield path, f"{path}: unknown key; {_hint(root, parent, name)}"
            return
        if name not in value:
            yield from _missing(path, key)
            return
        value, section, allowed = value[name], key.section, key.allowed
        if location and key.is_list_of_sections:
            index = int(location.pop(0))
            value, pattern = value[index], pattern + "[]"
            path, allowed = _entry_path(path, index, value), key.allowed_entry
    # A location that goes on within a leaf, into a list of numbers say, is told of the leaf.
    if detail["type"] in ("value_error", "assertion_error"):
        yield path, f"{path}: {detail.get('ctx', {}).get('error', detail['msg'])}"
    else:
        finite = "finite " if detail["type"] == "finite_number" else ""
        yield path, f"{path}: {show(value)} is not allowed; needs {finite}{allowed}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _entry_path(path: str, index: int, entry: Any) -> str:
    """`rewards.format`, the way the command line says it, or `rewards[1]` without a name."""
    name = entry.get("name") if isinstance(entry, dict) else None  # pyright: ignore
    return f"{path}.{name}" if isinstance(name, str) else f"{path}[{index}]"


def _missing(path: str, key: Key) -> Iterator[tuple[str, str]]:
    """A missing section is told as the keys that it must hold."""
    if key.section is None or key.is_list_of_sections:
        yield path, f"{path}: missing; needs {key.allowed}"
        return
    for below in keys_of(key.section).values():
        if below.default is MISSING:
            yield from _missing(f"{path}.{below.name}", below)


def _hint(root: type, parent: str, name: str) -> str:
    """What an unknown key in section `parent` was probably meant to be."""
    paths = [path for path, _ in walk(root)]
    siblings = [path.rpartition(".")[2] for path in paths if path.rpartition(".")[0] == parent]
    by_leaf: dict[str, list[str]] = {}
    for path in paths:
        by_leaf.setdefault(path.rpartition(".")[2], []).append(path)

    ours = OTHER_NAMES.get(name)
    if ours in siblings:
        return f"did you mean '{ours}'?"
    hints = [f"did you mean '{near}'?" for near in get_close_matches(name, siblings, n=1)]
    if name in by_leaf:
        homes = [path.rpartition(".")[0] or "the top level" for path in by_leaf[name]]
        hints.append(f"'{name}' belongs to {' or '.join(homes)}")
    elif not hints:
        far = [ours] if ours in by_leaf else get_close_matches(name, by_leaf, n=1, cutoff=0.75)
        hints = [f"did you mean {' or '.join(by_leaf[leaf])}?" for leaf in far]
    return ", and ".join(hints) or did_you_mean(name, siblings)
