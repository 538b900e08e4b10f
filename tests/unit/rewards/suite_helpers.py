"""Rollouts, suites over the functions of suite_rewards.py, and what is left of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from gdpo_megatron.config.schema import RewardConfig, RewardSuiteConfig
from gdpo_megatron.rewards.scores import RewardScores
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.types import Completion, Prompt, Rollout

HERE = Path(__file__).parent


def rollout(sample_id: int, text: str = "", *, group_size: int = 2, **fields: Any) -> Rollout:
    num_tokens = fields.pop("num_tokens", 1)
    return Rollout(
        group_id=sample_id // group_size,
        sample_id=sample_id,
        prompt=Prompt(
            prompt_id=f"row{sample_id}",
            token_ids=(1,),
            text=fields.pop("prompt", "Q"),
            answer=fields.pop("answer", None),
            metadata=fields.pop("metadata", {}),
        ),
        completion=Completion(
            token_ids=(5,) * num_tokens,
            logprobs=(0.0,) * num_tokens,
            text=text,
            finish_reason=fields.pop("finish_reason", "stop"),
        ),
        policy_version=0,
    )


def reward(name: str, type: str | None = None, **fields: Any) -> RewardConfig:
    """A built-in reward by its type; else the function of suite_rewards.py of that name."""
    return RewardConfig(name=name, type=type or f"./suite_rewards.py:{name}", **fields)


def mine(name: str, function: str, **fields: Any) -> RewardConfig:
    """A function of suite_rewards.py under another name."""
    return RewardConfig(name=name, type=f"./suite_rewards.py:{function}", **fields)


def suite(
    *rewards: RewardConfig, group_size: int = 2, log_path: Path | None = None, **settings: Any
) -> RewardSuite:
    settings.setdefault("sample_timeout_seconds", 600.0)  # nobody's, however slow the machine
    return RewardSuite(
        rewards,
        group_size=group_size,
        config=RewardSuiteConfig(**settings),
        base_dir=HERE,
        log_path=log_path,
    )


def score(*rewards: RewardConfig, texts: Sequence[str], **settings: Any) -> RewardScores:
    group_size = settings.get("group_size", 2)
    with suite(*rewards, **settings) as running:
        for sample_id, text in enumerate(texts):
            running.submit(rollout(sample_id, text, group_size=group_size))
        return running.collect()


def assert_same(first: RewardScores, second: RewardScores) -> None:
    torch.testing.assert_close(first.raw, second.raw, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(first.values, second.values, rtol=0, atol=0, equal_nan=True)
    for field in ("sample_ids", "valid", "not_applicable"):
        assert torch.equal(getattr(first, field), getattr(second, field))
    for field in ("names", "reasons", "num_invalid", "num_not_applicable"):
        assert getattr(first, field) == getattr(second, field)
    assert first.tracebacks.keys() == second.tracebacks.keys()


def wait_until(condition: Callable[[], bool], complaint: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that only waits to be reaped is none."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
