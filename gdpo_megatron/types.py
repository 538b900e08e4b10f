"""The records that travel between the parts of a step: prompts, completions, rewards, advantages.

Letters used for shapes everywhere: P prompts a step, G group size, B = P * G rollouts, K rewards,
T completion tokens, S padded sequence length, b rows of a micro-batch. Groups are found by
`group_id`, rewards by name; neither by position. A reward that is missing is `valid=False` with a
reason, never a silent 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the data set, tokenised.

    Example: Prompt(prompt_id="gsm8k/train.jsonl:12", token_ids=(1, 40, 7), text="2+2=", answer="4")
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    text: str
    answer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine made of a prompt; `token_ids` includes the stop token where one ended it.

    `logprobs` [T] are those of the sampled tokens at sampling time, at the rollout's temperature.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} token_ids but {len(self.logprobs)} logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the model wrote until an environment answered, and the answer.

    Args:
        start, end: the model's tokens, of the completion's; the answer's are from `end` to the next
            turn's `start`.
        text: of the model's tokens.
        observation: the answer's text, as the model was given it; "" where the completion ends.
        rewards: named rewards that the environment gave for the turn.
    """

    start: int
    end: int
    text: str
    observation: str = ""
    rewards: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A prompt with one of its completions.

    `group_id` counts the prompts of a step from 0; `sample_id` is group_id * G + index in group,
    unique in the step. `policy_version` is that of the weights which finished it. Where it was
    carried over from earlier steps, `policy_versions` has (first token, version) of each span of
    its tokens, in order; not given, all are of `policy_version`.

    With an environment, `turns` says which of the completion's tokens are the model's; the others
    have log-prob 0, and `completion.text` leaves them out. `fault` says why the environment gave no
    answer; nothing is known of such a rollout's worth.
    """

    group_id: int
    sample_id: int
    prompt: Prompt
    completion: Completion
    policy_version: int
    policy_versions: tuple[tuple[int, int], ...] = ()
    turns: tuple[Turn, ...] = ()
    fault: str = ""

    def __post_init__(self) -> None:
        if not self.policy_versions:
            object.__setattr__(self, "policy_versions", ((0, self.policy_version),))

    @property
    def num_tokens(self) -> int:
        """Tokens of the completion that the model drew."""
        if not self.turns:
            return len(self.completion.token_ids)
        return sum(turn.end - turn.start for turn in self.turns)

    def loss_mask(self) -> list[bool]:
        """For each token of the completion, whether the model drew it."""
        mask = [not self.turns] * len(self.completion.token_ids)
        for turn in self.turns:
            mask[turn.start : turn.end] = [True] * (turn.end - turn.start)
        return mask


@dataclass(frozen=True, slots=True)
class RewardMatrix:
    """Raw, unweighted rewards of a whole step.

    Args:
        names: K reward names, in config order.
        values: [B, K] floating point; an entry with valid=False may hold anything, NaN included.
        valid: [B, K] bool.
        group_ids: [B] int64; equal ids form a group; any order, any sizes.
        reasons: (row, reward name) -> why the entry is invalid; optional.

    Raises:
        ValueError: shapes or dtypes do not fit, or a name appears twice.
    """

    names: tuple[str, ...]
    values: Tensor
    valid: Tensor
    group_ids: Tensor
    reasons: Mapping[tuple[int, str], str] | None = None

    def __post_init__(self) -> None:
        names, values, valid, group_ids = self.names, self.values, self.valid, self.group_ids
        if len(set(names)) != len(names):
            raise ValueError(f"RewardMatrix.names holds a name twice: {names}")
        for field_name in ("values", "valid", "group_ids"):
            if not isinstance(getattr(self, field_name), Tensor):
                given = type(getattr(self, field_name)).__name__
                raise ValueError(f"RewardMatrix.{field_name} must be a tensor, got {given}")
        if values.ndim != 2 or values.shape[1] != len(names):
            raise ValueError(
                f"RewardMatrix.values must be [B, {len(names)}] for names {names}, "
                f"got {tuple(values.shape)}"
            )
        if not values.dtype.is_floating_point:
            raise ValueError(f"RewardMatrix.values must be floating point, got {values.dtype}")
        if valid.shape != values.shape or valid.dtype != torch.bool:
            raise ValueError(
                f"RewardMatrix.valid must be bool {tuple(values.shape)}, "
                f"got {valid.dtype} {tuple(valid.shape)}"
            )
        if group_ids.shape != values.shape[:1] or group_ids.dtype != torch.int64:
            raise ValueError(
                f"RewardMatrix.group_ids must be int64 [{values.shape[0]}], "
                f"got {group_ids.dtype} {tuple(group_ids.shape)}"
            )


@dataclass(frozen=True, slots=True)
class AdvantageBatch:
    """Result of the advantage stage, float64, rows as in the RewardMatrix.

    Args:
        advantages: [B] after the batch stage; what the loss uses.
        per_reward: [B, K] group-normalised, unweighted.
        combined: [B] weighted sum of `per_reward`, before the batch stage.
        stats: named scalars of the stage, for logging.
        loss_rows: [B] bool; False where a row has no score at all or the estimator dropped it, and
            the loss must leave it out. Not given means all rows.
    """

    advantages: Tensor
    per_reward: Tensor
    combined: Tensor
    stats: Mapping[str, float] = field(default_factory=dict[str, float])
    loss_rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))

    def __post_init__(self) -> None:
        if self.loss_rows.shape != self.advantages.shape:
            rows = torch.ones_like(self.advantages, dtype=torch.bool)
            object.__setattr__(self, "loss_rows", rows)
