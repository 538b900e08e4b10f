"""Sampled rollouts as text that a person can read: <run_dir>/rollouts/step_000010.jsonl.

One JSON object per rollout, rollouts of a group together. Reading some of them is the fastest way
to see what a reward really rewards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gdpo_megatron.observability.files import write_atomically
from gdpo_megatron.types import RewardMatrix, Rollout, Turn


def write_rollouts(
    run_dir: Path,
    step: int,
    rollouts: Mapping[int, Rollout],
    rewards: RewardMatrix,
    advantages: Tensor,
) -> Path:
    """Write some rollouts of a step, replacing the file of an earlier attempt at it.

    Args:
        run_dir: folder of the run.
        step: the step that made them.
        rollouts: row of the reward matrix -> the rollout that it scores.
        rewards: B rows; an invalid entry is written as null, with its reason in `unscored`.
        advantages: [B], what the loss uses.

    Returns:
        The file.
    """
    records = [
        _record(step, rollout, row, rewards, float(advantages[row]))
        for row, rollout in sorted(rollouts.items(), key=lambda item: item[1].sample_id)
    ]
    path = run_dir / "rollouts" / f"step_{step:06d}.jsonl"
    lines = (json.dumps(it, ensure_ascii=False, allow_nan=False) for it in records)
    write_atomically(path, "".join(f"{line}\n" for line in lines))
    return path


def _record(
    step: int, rollout: Rollout, row: int, rewards: RewardMatrix, advantage: float
) -> dict[str, Any]:
    group_id = int(rewards.group_ids[row])
    if group_id != rollout.group_id:
        raise ValueError(
            f"row {row} is of group {group_id}, but sample {rollout.sample_id} of group "
            f"{rollout.group_id}"
        )
    values = [float(value) for value in rewards.values[row]]
    valid = [bool(flag) for flag in rewards.valid[row]]
    reasons = rewards.reasons or {}
    unscored = {
        name: reasons.get((row, name), "no reason given")
        for name, flag in zip(rewards.names, valid, strict=True)
        if not flag
    }
    return {
        "step": step,
        "group_id": rollout.group_id,
        "sample_id": rollout.sample_id,
        "prompt_id": rollout.prompt.prompt_id,
        "prompt": rollout.prompt.text,
        "completion": rollout.completion.text,
        "finish_reason": rollout.completion.finish_reason,
        "num_tokens": rollout.num_tokens,
        **({"turns": [_turn(turn) for turn in rollout.turns]} if rollout.turns else {}),
        **({"fault": rollout.fault} if rollout.fault else {}),
        "rewards": {
            name: value if flag and math.isfinite(value) else None
            for name, value, flag in zip(rewards.names, values, valid, strict=True)
        },
        **({"unscored": unscored} if unscored else {}),
        "advantage": advantage if math.isfinite(advantage) else None,
        "policy_version": rollout.policy_version,
        **(
            {"policy_versions": [list(span) for span in rollout.policy_versions]}
            if len(rollout.policy_versions) > 1
            else {}
        ),
    }


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "text": turn.text,
        "observation": turn.observation,
        "rewards": dict(turn.rewards),
        "num_tokens": turn.end - turn.start,
    }
