"""What docs/environments.md shows works as it is written there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gdpo_megatron.config.environment import EnvironmentConfig
from gdpo_megatron.config.schema import RewardConfig
from gdpo_megatron.environments.base import Task
from gdpo_megatron.environments.resolve import environment_factory
from gdpo_megatron.environments.tools import REWARD_NAMES, TOOLS, ToolsEnvironment
from gdpo_megatron.rewards.base import RewardSample
from gdpo_megatron.rewards.resolve import resolve_rewards

DOCS = Path(__file__).resolve().parents[3] / "docs" / "environments.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for block in blocks("python"):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name is not None, "a python block starts with its file's name"
        (tmp_path / name[1]).write_text(block)
    (tmp_path / "words.json").write_text(json.dumps({"apple": "a fruit"}))
    return tmp_path


def documented(word: str) -> tuple[EnvironmentConfig, list[RewardConfig]]:
    """The one config whose environment's section holds a word."""
    (whole,) = [it for it in map(yaml.safe_load, blocks("yaml")) if word in json.dumps(it)]
    section = EnvironmentConfig(**whole["rollout"]["environment"])
    return section, [RewardConfig(**it) for it in whole.get("rewards", [])]


def make(section: EnvironmentConfig, files: Path, **metadata: Any):
    environment = environment_factory(section.type, section.args, files)()
    environment.reset(Task(prompt="p", metadata=metadata))
    return environment


def test_an_environment_of_ones_own(files: Path):
    section, rewards = documented("guess.py")
    environment = make(section, files, number=40)
    steps = [environment.step(turn) for turn in ("It is 20", "what?", "So 50", "Then 40")]
    assert [it.observation for it in steps] == [
        "It is higher.",
        "Say a number.",
        "It is lower.",
        "",
    ]
    assert [it.done for it in steps] == [False, False, False, True]
    assert steps[-1].rewards == {"number": 1.0, "found": 0.5}  # 2.0 / 4 guesses
    turns = [{"rewards": it.rewards} for it in steps]
    sample = RewardSample(completion="", turns=turns)
    scores = {it.name: it.fn.function(sample, **it.args) for it in resolve_rewards(rewards)}
    assert scores == {"found": 0.5, "number": 0.0}


def test_a_tool_of_ones_own(files: Path):
    section, _ = documented("dictionary.py")
    environment = make(section, files)

    def ask(word: str) -> str:
        call = {"name": "dictionary", "arguments": {"word": word}}
        return environment.step(f"<tool_call>{json.dumps(call)}</tool_call>").observation

    assert ask("apple") == "<tool_response>\na fruit\n</tool_response>"
    assert "Error: 'pear' is not in the dictionary" in ask("pear")
    assert "is too long" in ask("a" * 41)


def test_the_first_config_and_the_conversation(files: Path):
    section, rewards = documented("python")
    assert isinstance(make(section, files), ToolsEnvironment)
    assert resolve_rewards(rewards)[1].args["name"] in REWARD_NAMES
    call, response = DOCS.read_text().split("<tool_call>\n")[1].split("</tool_call>\n")[:2]
    response = response.split("```")[0]
    shown = "\n".join(line.strip() for line in response.strip().splitlines())
    calculator = ToolsEnvironment(["calculator"])
    assert calculator.step(f"<tool_call>\n{call}</tool_call>").observation == shown


def test_all_names_are_there():
    text = DOCS.read_text()
    for name in REWARD_NAMES:
        assert f"| `{name}` |" in text
    for name in TOOLS.names():
        assert f"### {name}\n" in text
