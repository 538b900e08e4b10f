"""The table of docs/rewards_builtin.md: every built-in reward, its arguments, its function."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import yaml
from pydantic import TypeAdapter

from gdpo_megatron.config.schema import RewardConfig
from gdpo_megatron.rewards import REWARDS, resolve_rewards

DOCS = Path(__file__).resolve().parents[3] / "docs" / "rewards_builtin.md"
BUILTIN = "gdpo_megatron.rewards.builtin"


def rows() -> dict[str, tuple[str, str]]:
    """Registered name -> (its arguments, the plain function) as the table shows them."""
    table = re.findall(r"^\| `(\w+)` \| (.*) \|.*\| (.+?) \|$", DOCS.read_text(), re.MULTILINE)
    return {name: (arguments, function) for name, arguments, function in table}


def test_every_builtin_is_in_the_table():
    builtin = [name for name in REWARDS.names() if REWARDS.get(name).__module__.startswith(BUILTIN)]
    assert sorted(rows()) == builtin and len(builtin) >= 9


def test_arguments_and_defaults_are_those_of_the_function():
    for name, (arguments, _) in rows().items():
        _, *options = inspect.signature(REWARDS.get(name)).parameters.values()
        shown = [
            option.name
            if option.default is inspect.Parameter.empty
            else f"{option.name}: {_yaml(option.default)}"
            for option in options
        ]
        # `...` stands for a default that would not fit a table.
        expected = [
            re.escape(text) if len(text) < 40 else f"{text.partition(':')[0]}: \\.\\.\\."
            for text in shown
        ]
        assert re.fullmatch(", ".join(f"`{text}`" for text in expected) or "-", arguments), name


def test_functions_exist_and_take_what_the_table_says():
    for name, (_, function) in rows().items():
        module, attribute, parameters = re.fullmatch(r"`(\w+)\.(\w+)\((.*)\)`", function).groups()
        found = getattr(importlib.import_module(f"{BUILTIN}.{module}"), attribute)
        required = [
            parameter.name
            for parameter in inspect.signature(found).parameters.values()
            if parameter.default is inspect.Parameter.empty
        ]
        assert parameters.split(", ") == required, name


def test_examples_resolve():
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        resolve_rewards(
            TypeAdapter(list[RewardConfig]).validate_python(yaml.safe_load(block)["rewards"])
        )


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if value in (True, False) else str(value)
