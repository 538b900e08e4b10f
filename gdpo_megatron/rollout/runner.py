"""A step's prompts, spread over the engines, generated, scored, and brought together.

The prompts form one global batch. Group i goes to engine replica i mod R, whole, so its prompt is
prefilled once and batch rewards see it entire. Rewards start as completions finish. Afterwards
every rank knows lengths and rewards of all rollouts; the tokens stay with the leader of the engine
that made them until the trainer's layout asks for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo_megatron.config.schema import SamplingConfig
from gdpo_megatron.distributed.exchange import gather_by_sample, gather_texts
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.platform import Platform
from gdpo_megatron.rewards.breaker import check_invalid
from gdpo_megatron.rewards.report import RewardReport
from gdpo_megatron.rewards.scores import RewardScores
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.rollout.base import (
    FinishedCompletion,
    RolloutEngine,
    RolloutRequest,
    SamplingParams,
    generate,
    noise_key,
)
from gdpo_megatron.types import FinishReason, Prompt, RewardMatrix, Rollout

_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """B rollouts of a step, rows by sample id; tensors are equal on all ranks.

    Args:
        rollouts: sample id -> rollout, on the leader of the engine that made it; elsewhere empty.
        reasons: (sample id, reward name) -> why an entry of `rollouts` has no value.
        report: what happened while the rewards ran, over all engines; equal on all ranks.
        lengths: [B] int64, completion tokens.
        finish: [B] int64, index into ("stop", "length", "abort").
        rewards: [B, K] with conditions applied.
        raw: [B, K] before the conditions; NaN where there is no score.
        not_applicable: [B, K] bool.
        replica_of: [B], the engine replica that made each.
    """

    rollouts: dict[int, Rollout]
    reasons: dict[tuple[int, str], str]
    report: RewardReport
    lengths: Tensor
    finish: Tensor
    rewards: RewardMatrix
    raw: Tensor
    not_applicable: Tensor
    replica_of: list[int]

    @classmethod
    def joined(cls, rounds: Sequence[RolloutBatch]) -> RolloutBatch:
        """The rounds of a step as one batch, in their order."""
        if len(rounds) == 1:
            return rounds[0]
        matrices = [r.rewards for r in rounds]
        return cls(
            rollouts={s: rollout for r in rounds for s, rollout in r.rollouts.items()},
            reasons={key: why for r in rounds for key, why in r.reasons.items()},
            report=RewardReport.over_rounds([r.report for r in rounds]),
            lengths=torch.cat([r.lengths for r in rounds]),
            finish=torch.cat([r.finish for r in rounds]),
            rewards=RewardMatrix(
                matrices[0].names,
                torch.cat([m.values for m in matrices]),
                torch.cat([m.valid for m in matrices]),
                torch.cat([m.group_ids for m in matrices]),
            ),
            raw=torch.cat([r.raw for r in rounds]),
            not_applicable=torch.cat([r.not_applicable for r in rounds]),
            replica_of=[replica for r in rounds for replica in r.replica_of],
        )

    def check_invalid(self, max_fraction: float) -> None:
        """Raise TooManyInvalid where a reward is broken; the same on all ranks."""
        counts: list[int] = self.not_applicable.sum(0).tolist()
        check_invalid(self.rewards, counts, self.report, max_fraction)

    def finish_share(self, reason: FinishReason) -> float:
        """Share of the rollouts that ended for `reason`."""
        return float((self.finish == _REASONS.index(reason)).double().mean())


def sampling_params(
    config: SamplingConfig, default_stop_token_ids: Sequence[int]
) -> SamplingParams:
    """Sampling parameters of a config section; its null stop_token_ids means the model's own."""
    stop_ids = config.stop_token_ids
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_completion_tokens=config.max_completion_tokens,
        stop=config.stop,
        stop_token_ids=tuple(default_stop_token_ids if stop_ids is None else stop_ids),
    )


def run_rollouts(
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    sampling: SamplingParams,
    engine: RolloutEngine,
    engines: EngineMesh,
    suite: RewardSuite,
    platform: Platform,
    seed: int,
    stream: str,
    step: int,
    first_group: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_generated: Callable[[], None] = lambda: None,
) -> RolloutBatch:
    """Generate and score `group_size` completions of each prompt; collective over all ranks.

    Args:
        prompts: the global batch, equal on all ranks; prompt i is group i.
        group_size: G.
        sampling: how tokens are drawn.
        engine: this rank's engine, with the version's weights loaded.
        engines: its mesh.
        suite: rewards; used by the engines' leaders.
        platform: where collectives run.
        seed: of the sampling noise.
        stream: "train" or "eval", part of the noise's key.
        step: part of the noise's key.
        first_group: number of the first prompt, where a step samples in several rounds.
        on_progress: called with (done, total) completions of this engine.
        on_generated: called when this engine is done and only rewards are waited for.

    Raises:
        RuntimeError: the engine returned a completion of another policy version, or log-probs that
            are not finite.
    """
    num_samples, version = len(prompts) * group_size, engine.policy_version
    first = first_group * group_size
    replica_of = [s // group_size % engines.num_replicas for s in range(num_samples)]
    own = [first + s for s in range(num_samples) if replica_of[s] == engines.replica]
    leads = engines.tp_rank == 0
    rollouts: dict[int, Rollout] = {}
    num_done = 0

    def finished(result: FinishedCompletion) -> None:
        nonlocal num_done
        if result.policy_version != version:
            raise RuntimeError(
                f"rollout {result.request_id} was made by policy version {result.policy_version}, "
                f"not {version}"
            )
        if not all(math.isfinite(x) for x in result.completion.logprobs):
            raise RuntimeError(f"rollout {result.request_id} has log-probs that are not finite")
        num_done += 1
        on_progress(num_done, len(own))
        if leads:
            group = result.request_id // group_size
            rollout = Rollout(
                group_id=group,
                sample_id=result.request_id,
                prompt=prompts[group - first_group],
                completion=result.completion,
                policy_version=result.policy_version,
            )
            rollouts[result.request_id] = rollout
            suite.submit(rollout)

    if leads:
        suite.start()
    requests = [
        RolloutRequest(
            request_id=s,
            prompt_token_ids=prompts[s // group_size - first_group].token_ids,
            noise_key=noise_key(seed, stream, step, s // group_size, s % group_size),
        )
        for s in own
    ]
    generate(engine, requests, sampling, finished)
    on_generated()
    scores = suite.collect() if leads else None
    group_ids = first_group + torch.arange(num_samples) // group_size
    return _gather(rollouts, scores, suite.names, first, group_ids, replica_of, platform)


def _gather(
    rollouts: dict[int, Rollout],
    scores: RewardScores | None,
    names: tuple[str, ...],
    first: int,
    group_ids: Tensor,
    replica_of: list[int],
    platform: Platform,
) -> RolloutBatch:
    ids, num_samples = sorted(rollouts), len(group_ids)
    report = RewardReport() if scores is None else scores.report
    rows = [i - first for i in ids]
    facts = torch.tensor(
        [
            (
                len(rollouts[i].completion.token_ids),
                _REASONS.index(rollouts[i].completion.finish_reason),
            )
            for i in ids
        ],
        dtype=torch.int64,
    ).reshape(-1, 2)
    empty = torch.empty(0, len(names))
    columns = [
        empty.double() if scores is None else scores.values,
        empty.double() if scores is None else scores.raw,
        empty.bool() if scores is None else scores.valid,
        empty.bool() if scores is None else scores.not_applicable,
    ]
    assert scores is None or scores.sample_ids.tolist() == ids
    device = platform.device
    reports = gather_texts(json.dumps(report.as_json()), device)
    facts = gather_by_sample(rows, facts, num_samples, device)
    values, raw, valid, not_applicable = (
        gather_by_sample(rows, column, num_samples, device) for column in columns
    )
    return RolloutBatch(
        rollouts=rollouts,
        reasons={} if scores is None else dict(scores.reasons),
        report=RewardReport.over_engines([RewardReport(**json.loads(it)) for it in reports]),
        lengths=facts[:, 0],
        finish=facts[:, 1],
        rewards=RewardMatrix(names, values, valid, group_ids),
        raw=raw,
        not_applicable=not_applicable,
        replica_of=replica_of,
    )
