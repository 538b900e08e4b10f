"""Each key of each example config, misspelt and removed: nothing of a config file goes unnoticed.

A misspelt key is refused by its name. A removed one is refused by its name where it is required,
else what is resolved is the schema's default, or the parent file's value. Arguments of rewards and
environments are checked against the functions that take them. Not covered: what a default does to a
run; keys whose value is wrong (tests/unit/config).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest

from gdpo_megatron.config import yaml_text
from gdpo_megatron.config.fields import keys_of
from gdpo_megatron.config.loader import load_config
from gdpo_megatron.config.schema import RLConfig, SFTConfig
from gdpo_megatron.environments.resolve import environment_factory
from gdpo_megatron.errors import InputError
from gdpo_megatron.rewards.resolve import resolve_rewards

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("examples/**/*.yaml"))
Place = tuple[str | int, ...]
"""Keys and numbers of list entries, from the top."""


def places(data: Any, above: Place = ()) -> Iterator[Place]:
    """Every key of a raw config, sections before their keys."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield (*above, name)
            yield from places(value, (*above, name))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from places(value, (*above, number))


def changed(data: dict[str, Any], place: Place, new_name: str | None) -> dict[str, Any]:
    """A copy with one key renamed, or removed."""
    data = copy.deepcopy(data)
    holder: Any = data
    for part in place[:-1]:
        holder = holder[part]
    value = holder.pop(place[-1])
    if new_name is not None:
        holder[new_name] = value
    return data


def misspelt(name: str) -> str:
    return name[:-1] if len(name) > 3 else f"{name}x"


class Example:
    """A config, to be loaded with changes from a folder of its own."""

    def __init__(self, path: Path, folder: Path):
        self.folder, self.base_dir = folder, path.parent
        self.data = yaml_text.read_mapping(path, [])
        self.root = SFTConfig if path.stem == "sft" else RLConfig
        self.parent: Any = None
        if "defaults" in self.data:
            self.data["defaults"] = str(path.parent / self.data["defaults"])
            self.parent = self.load({"defaults": self.data["defaults"]})

    def load(self, data: dict[str, Any]) -> Any:
        path = self.folder / "config.yaml"
        path.write_text(yaml_text.dump(data))
        return load_config(self.root, path)

    def check_arguments(self, config: Any) -> None:
        """As validation does, with what stands beside the config."""
        if isinstance(config, RLConfig):
            resolve_rewards([*config.rewards], self.base_dir)
            environment = config.rollout.environment
            if environment is not None:
                environment_factory(environment.type, environment.args, self.base_dir)

    def problems(self, data: dict[str, Any]) -> list[str]:
        with pytest.raises(InputError) as refused:
            self.check_arguments(self.load(data))
        return refused.value.problems

    def without(self, place: Place) -> Any:
        """What a key resolves to that neither this file nor a list entry sets."""
        entry = any(isinstance(part, int) for part in place)
        if self.parent is not None and not entry:
            return value_at(self.parent, place)
        section: Any = self.root
        default: Any = MISSING
        for part in place:
            if isinstance(part, int):
                continue
            key = keys_of(section)[part]
            section, default = key.section, key.default
        return default


def value_at(config: Any, place: Place) -> Any:
    """None where a section on the way is null."""
    for part in place:
        if config is None:
            return None
        config = config[part] if isinstance(part, int) else getattr(config, part)
    return config


def arguments_at(place: Place) -> int | None:
    """Where in a place the free-form arguments of a function begin."""
    return place.index("args") if "args" in place else None


@pytest.fixture(params=CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Example:
    return Example(request.param, tmp_path)


def test_each_misspelt_key_is_refused_by_its_name(example: Example):
    seen = 0
    for place in places(example.data):
        begin = arguments_at(place)
        if begin is not None and len(place) > begin + 2:
            continue  # below an argument: its value
        name = str(place[-1])
        wrong = misspelt(name)
        problems = example.problems(changed(example.data, place, wrong))
        assert any(wrong in line for line in problems), (place, problems)
        assert begin is not None or any("unknown key" in line for line in problems), problems
        seen += 1
    assert seen >= 3


def test_each_removed_key_is_refused_or_its_default(example: Example):
    whole = example.load(example.data)
    example.check_arguments(whole)
    for place in places(example.data):
        begin = arguments_at(place)
        if begin is not None and len(place) > begin + 1:
            continue  # see below
        if place == ("defaults",):
            continue  # the rest is of the file alone
        data = changed(example.data, place, None)
        try:
            config = example.load(data)
        except InputError as error:
            # Of its name, or of the section that does not fit together without it.
            section = ".".join(map(str, place[:-1]))
            named = (str(place[-1]) in it or it.startswith(f"{section}:") for it in error.problems)
            assert any(named), (place, error.problems)
            continue
        expected = example.without(place)
        assert expected is not MISSING, f"{place} is required, and was not missed"
        found = value_at(config, place)
        assert found == expected, (place, found, expected)


def test_each_removed_argument_is_missed_or_has_a_default(example: Example):
    for place in places(example.data):
        begin = arguments_at(place)
        if begin is None or len(place) != begin + 2:
            continue
        config = example.load(changed(example.data, place, None))
        if place[0] != "rewards":
            continue  # an environment's factory says itself what it needs
        number = place[1]
        assert isinstance(number, int)
        try:
            reward = resolve_rewards([*config.rewards], example.base_dir)[number]
        except InputError as error:
            assert any(str(place[-1]) in line for line in error.problems), (place, error.problems)
            continue
        default = inspect.signature(reward.fn.function).parameters[str(place[-1])].default
        assert default is not inspect.Parameter.empty
