"""A step's prompts, spread over the engines, generated, scored, and brought together.

The prompts form one global batch. Group i goes to engine replica i mod R, whole, so its prompt is
prefilled once and batch rewards see it entire. Rewards start as completions finish. Afterwards
every rank knows lengths and rewards of all rollouts; the tokens stay with the leader of the engine
that made them until the trainer's layout asks for them.

    generate (generation.py) --> agree: failures, groups that are used --> rewards --> gather
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gdpo_megatron.config.long_tail import LongTailConfig
from gdpo_megatron.config.schema import SamplingConfig
from gdpo_megatron.distributed.exchange import gather_by_sample, gather_texts
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.platform import Platform
from gdpo_megatron.rewards.breaker import check_invalid
from gdpo_megatron.rewards.report import RewardReport
from gdpo_megatron.rewards.scores import RewardScores
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.rollout.base import RolloutEngine, SamplingParams
from gdpo_megatron.rollout.episodes import EnvironmentReport, EnvironmentRuntime, Episodes
from gdpo_megatron.rollout.failure import FailureReport, engine_failure
from gdpo_megatron.rollout.generation import Generation, Noise
from gdpo_megatron.rollout.long_tail import Cut, GroupRequest, TailCut, deal_groups, join_counts
from gdpo_megatron.rollout.stall import StallLimit
from gdpo_megatron.types import FinishReason, Prompt, RewardMatrix, Rollout

_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """B rollouts of a step, rows by sample id; tensors are equal on all ranks.

    Args:
        rollouts: sample id -> rollout, on the leader of the engine that made it; elsewhere empty.
        reasons: (sample id, reward name) -> why an entry of `rollouts` has no value.
        report: what happened while the rewards ran, over all engines; equal on all ranks.
        lengths: [B] int64, completion tokens, those of environments included.
        num_loss_tokens: [B] int64, those of them that the model drew.
        num_turns: [B] int64, turns of the model.
        finish: [B] int64, index into ("stop", "length", "abort").
        rewards: [B, K] with conditions applied.
        raw: [B, K] before the conditions; NaN where there is no score.
        not_applicable: [B, K] bool.
        replica_of: [B], the engine replica that made each.
        num_generated_tokens: completion tokens that the engines drew, unused ones included.
        cut: the groups that were asked for and are not here.
        environment: what environments did, over all engines.
    """

    rollouts: dict[int, Rollout]
    reasons: dict[tuple[int, str], str]
    report: RewardReport
    lengths: Tensor
    num_loss_tokens: Tensor
    num_turns: Tensor
    finish: Tensor
    rewards: RewardMatrix
    raw: Tensor
    not_applicable: Tensor
    replica_of: list[int]
    num_generated_tokens: int
    cut: Cut
    environment: EnvironmentReport

    @classmethod
    def joined(cls, rounds: Sequence[RolloutBatch]) -> RolloutBatch:
        """The rounds of a step as one batch, in their order; none of them with groups cut."""
        if len(rounds) == 1:
            return rounds[0]
        matrices = [r.rewards for r in rounds]
        return cls(
            rollouts={s: rollout for r in rounds for s, rollout in r.rollouts.items()},
            reasons={key: why for r in rounds for key, why in r.reasons.items()},
            report=RewardReport.over_rounds([r.report for r in rounds]),
            lengths=torch.cat([r.lengths for r in rounds]),
            num_loss_tokens=torch.cat([r.num_loss_tokens for r in rounds]),
            num_turns=torch.cat([r.num_turns for r in rounds]),
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
            num_generated_tokens=sum(r.num_generated_tokens for r in rounds),
            cut=Cut.joined([r.cut for r in rounds]),
            environment=EnvironmentReport.joined([r.environment for r in rounds]),
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


def run_rollouts(prompts: Sequence[Prompt], *, step: int, **options: Any) -> RolloutBatch:
    """Generate and score completions of each prompt, all of them; see `run_groups`.

    Args:
        prompts: the global batch, equal on all ranks; prompt i is group i.
        step: part of the noise's key.
        options: of `run_groups`.
    """
    first = options.get("first_group", 0)
    groups = [
        GroupRequest(prompt=prompt, noise_step=step, noise_group=number)
        for number, prompt in enumerate(prompts, first)
    ]
    return run_groups(groups, **options)


def run_groups(
    groups: Sequence[GroupRequest],
    *,
    group_size: int,
    sampling: SamplingParams,
    engine: RolloutEngine,
    engines: EngineMesh,
    suite: RewardSuite,
    platform: Platform,
    seed: int,
    stream: str,
    first_group: int = 0,
    num_wanted: int | None = None,
    long_tail: LongTailConfig | None = None,
    environment: EnvironmentRuntime | None = None,
    stall: StallLimit | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_generated: Callable[[], None] = lambda: None,
) -> RolloutBatch:
    """Generate and score `group_size` completions of each group; collective over all ranks.

    Args:
        groups: the global batch, equal on all ranks but for parts.
        group_size: G.
        sampling: how tokens are drawn.
        engine: this rank's engine, with the version's weights loaded.
        engines: its mesh.
        suite: rewards; used by the engines' leaders.
        platform: where collectives run.
        seed: of the sampling noise.
        stream: "train" or "eval", part of the noise's key.
        first_group: number of the batch's first group, where a step samples in several rounds.
        num_wanted: groups that the batch is to have; all unless given.
        long_tail: when generation ends; not given, when all is finished.
        environment: what answers the model between its turns.
        stall: when generation counts as stalled; not given, never.
        on_progress: called with (done, total) completions of this engine.
        on_generated: called when all engines are done and only rewards are waited for.

    Raises:
        EngineFailure: an engine raised, stalled, or returned what the update cannot use: a
            completion of another policy version, log-probs that are not finite. The same on all
            ranks.
    """
    replica_of = deal_groups(groups, engines.num_replicas)
    long_tail = long_tail or LongTailConfig()
    leads = engines.tp_rank == 0
    tail = TailCut(
        long_tail,
        groups,
        replica_of,
        replica=engines.replica,
        num_replicas=engines.num_replicas,
        group_size=group_size,
        num_wanted=len(groups) if num_wanted is None else num_wanted,
    )
    if leads:
        suite.start()
    episodes = None
    if environment is not None:
        environment.start()
        episodes = Episodes(environment, sampling.max_completion_tokens)
    generation = Generation(
        groups,
        [g for g, replica in enumerate(replica_of) if replica == engines.replica],
        group_size=group_size,
        first_group=first_group,
        noise=Noise(seed, stream),
        engine=engine,
        tail=tail,
        on_progress=on_progress,
        on_finished=suite.submit if leads else lambda rollout: None,
        episodes=episodes,
    )
    failure = generation.run(sampling, stall, rank=dist.get_rank(), replica=engines.replica)
    cut, report = _agree(
        generation, episodes, failure, groups, replica_of, engines, long_tail, platform
    )
    on_generated()
    rollouts, scores = dict[int, Rollout](), None
    if leads:
        kept = [g for g in cut.kept if replica_of[g] == engines.replica]
        rollouts = {r.sample_id: r for g in kept for r in generation.rollouts(g)}
        for rollout in rollouts.values():  # the suite has those that are finished
            if rollout.completion.finish_reason == "abort":
                suite.submit(rollout)
        suite.drop(first_group + g for g in generation.own if g not in kept)
        scores = suite.collect()
    # Groups that are used are numbered anew, without gaps.
    number = {first_group + g: first_group + place for place, g in enumerate(cut.kept)}

    def renumbered(sample: int) -> int:
        return number[sample // group_size] * group_size + sample % group_size

    return _gather(
        {
            renumbered(s): replace(r, sample_id=renumbered(s), group_id=number[r.group_id])
            for s, r in rollouts.items()
        },
        scores,
        {} if scores is None else {(renumbered(s), n): w for (s, n), w in scores.reasons.items()},
        suite.names,
        first_group * group_size,
        first_group + torch.arange(len(cut.kept) * group_size) // group_size,
        [replica_of[g] for g in cut.kept for _ in range(group_size)],
        cut,
        report,
        platform,
    )


def _agree(
    generation: Generation,
    episodes: Episodes | None,
    failure: FailureReport | None,
    groups: Sequence[GroupRequest],
    replica_of: Sequence[int],
    engines: EngineMesh,
    config: LongTailConfig,
    platform: Platform,
) -> tuple[Cut, EnvironmentReport]:
    """What all engines did, told to all ranks; raises on all of them where one failed."""
    own: dict[str, Any] = {"failure": failure.as_json() if failure is not None else None}
    if failure is None and engines.tp_rank == 0:
        own |= generation.outcome(carries=config.max_carried_steps > 0)
        own["environment"] = {} if episodes is None else episodes.report().as_json()
    told = [json.loads(text) for text in gather_texts(json.dumps(own), platform.device)]
    failures = [it["failure"] for it in told if it["failure"] is not None]
    if failures:
        raise engine_failure(failures)
    leaders = [it for it in told if "kept" in it]
    carried = sorted(g for it in leaders for g in it["carried"])
    kept = sorted(g for it in leaders for g in it["kept"])
    returned = [g for g in range(len(groups)) if g not in {*kept, *carried}]
    reports = [EnvironmentReport(**it["environment"]) for it in leaders]
    cut = Cut(
        kept=tuple(kept),
        returned=tuple(returned),
        carried=tuple(
            replace(
                groups[g],
                replica=replica_of[g],
                steps_carried=groups[g].steps_carried + 1,
                parts=generation.parts(g) if replica_of[g] == engines.replica else (),
            )
            for g in carried
        ),
        counts={
            **join_counts([it["counts"] for it in leaders]),
            "num_groups_asked": len(groups),
            "num_groups_returned": len(returned),
            "num_groups_carried": len(carried),
            "num_groups_resumed": sum(g.steps_carried > 0 for g in groups),
        },
    )
    return cut, EnvironmentReport.joined(reports)


def _gather(
    rollouts: dict[int, Rollout],
    scores: RewardScores | None,
    reasons: Mapping[tuple[int, str], str],
    names: tuple[str, ...],
    first: int,
    group_ids: Tensor,
    replica_of: list[int],
    cut: Cut,
    environment: EnvironmentReport,
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
                rollouts[i].num_tokens,
                max(1, len(rollouts[i].turns)),
            )
            for i in ids
        ],
        dtype=torch.int64,
    ).reshape(-1, 4)
    empty = torch.empty(0, len(names))
    columns = [
        empty.double() if scores is None else scores.values,
        empty.double() if scores is None else scores.raw,
        empty.bool() if scores is None else scores.valid,
        empty.bool() if scores is None else scores.not_applicable,
    ]
    assert scores is None or len(scores.sample_ids) == len(ids)
    device = platform.device
    reports = gather_texts(json.dumps(report.as_json()), device)
    facts = gather_by_sample(rows, facts, num_samples, device)
    values, raw, valid, not_applicable = (
        gather_by_sample(rows, column, num_samples, device) for column in columns
    )
    return RolloutBatch(
        rollouts=rollouts,
        reasons=dict(reasons),
        report=RewardReport.over_engines([RewardReport(**json.loads(it)) for it in reports]),
        lengths=facts[:, 0],
        num_loss_tokens=facts[:, 2],
        num_turns=facts[:, 3],
        finish=facts[:, 1],
        rewards=RewardMatrix(names, values, valid, group_ids),
        raw=raw,
        not_applicable=not_applicable,
        replica_of=replica_of,
        num_generated_tokens=int(cut.counts["num_generated_tokens"]),
        cut=cut,
        environment=environment,
    )
