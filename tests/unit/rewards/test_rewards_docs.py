"""What docs/rewards.md shows works as it is written there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gdpo_megatron.config.schema import RewardConfig
from gdpo_megatron.rewards import NotApplicable
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.types import Completion, Prompt, Rollout

DOCS = Path(__file__).resolve().parents[3] / "docs" / "rewards.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)


def documented(first_type: str) -> list[RewardConfig]:
    """The `rewards` section whose first reward has this type."""
    sections: list[list[dict[str, Any]]] = [yaml.safe_load(b)["rewards"] for b in blocks("yaml")]
    (section,) = [s for s in sections if s[0]["type"] == first_type]
    return [RewardConfig(**entry) for entry in section]


@pytest.fixture
def files(tmp_path: Path, registry_restored: None) -> Path:
    for block in blocks("python"):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name is not None, "a python block starts with its file's name"
        (tmp_path / name[1]).write_text(block)
    return tmp_path


def score(rewards: list[RewardConfig], files: Path, rows: list[tuple[str, str | None, str, int]]):
    """Rows are (completion, answer, task, num_tokens), all of one group."""
    with RewardSuite(rewards, group_size=len(rows), base_dir=files) as suite:
        for sample_id, (text, answer, task, num_tokens) in enumerate(rows):
            prompt = Prompt(
                prompt_id="p", token_ids=(1,), text="Q", answer=answer, metadata={"task": task}
            )
            completion = Completion(
                token_ids=(5,) * num_tokens,
                logprobs=(0.0,) * num_tokens,
                text=text,
                finish_reason="stop",
            )
            suite.submit(
                Rollout(
                    group_id=0,
                    sample_id=sample_id,
                    prompt=prompt,
                    completion=completion,
                    policy_version=0,
                )
            )
        return suite.collect()


def test_first_example(files: Path):
    right = "<think>a</think>\n<answer>4</answer>"
    rows = [(right, "4", "", 256), (right, "4", "", 257), (right, "5", "", 3)]
    scores = score(documented("gsm8k_correctness"), files, rows)
    assert scores.values.tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    assert scores.raw[2].tolist() == [0.0, 1.0, 1.0]  # too short to matter: it is wrong


def test_file_example(files: Path):
    rows = [
        ("4", "4", "arithmetic", 1),
        ("5 please", "4", "arithmetic", 1),
        ("4", None, "arithmetic", 1),
        ("4", "4", "chat", 1),
    ]
    scores = score(documented("./my_rewards.py:polite"), files, rows)
    assert scores.values[:, 0].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert scores.values[:2, 1].tolist() == [1.0, 0.0]
    assert scores.num_invalid["right"] == {"row without answer": 1}
    assert scores.not_applicable[:, 1].tolist() == [False, False, False, True]
    assert scores.reasons[3, "right"] == NotApplicable.NOT_APPLICABLE.value


def test_batch_and_stateful_example(files: Path):
    rows = [("x", None, "", 9), ("because", None, "", 3), ("y", None, "", 5), ("z", None, "", 9)]
    scores = score(documented("./group_rewards.py:rank_by_length"), files, rows)
    assert scores.values[:, 0].tolist() == [0.0, 1.0, 0.5, 0.0]
    assert scores.values[:, 1].tolist() == [0.0, 1.0, 0.0, 0.0]


def test_state_example(files: Path):
    rows = [("once", None, "", 1), ("twice", None, "", 1), ("once", None, "", 1)]
    scores = score(documented("./first_rewards.py:first"), files, rows)
    assert scores.values[:, 0].tolist() == [1.0, 1.0, 0.0]
