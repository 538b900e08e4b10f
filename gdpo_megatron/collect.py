"""Where a step's rollouts come from: prompts, engines, environments and rewards, brought together.

prompts, carried groups -> generation with rewards beside it -> groups to train on
^                                                               |
+---- refilled, where dynamic sampling has dropped groups <-----+
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gdpo_megatron.algorithms.dynamic_sampling import Refill, decide_groups
from gdpo_megatron.build import Parts
from gdpo_megatron.config.advantage import AdvantageConfig
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.data.sampler import PromptSampler
from gdpo_megatron.distributed.mesh import EngineMesh
from gdpo_megatron.observability.progress import ProgressDisplay
from gdpo_megatron.rewards.suite import RewardSuite
from gdpo_megatron.rollout.base import RolloutEngine
from gdpo_megatron.rollout.long_tail import GroupRequest, LongTail
from gdpo_megatron.rollout.runner import RolloutBatch, run_groups, sampling_params
from gdpo_megatron.rollout.stall import StallLimit
from gdpo_megatron.step_metrics import environment_metrics, long_tail_metrics, rollout_metrics
from gdpo_megatron.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The rollouts of a step.

    Args:
        prompts: by group id.
        batch: all rollouts, those of dropped groups included.
        kept: ids of the groups to train on.
        metrics: of the rollouts.
    """

    prompts: list[Prompt]
    batch: RolloutBatch
    kept: list[int]
    metrics: dict[str, float]


class RolloutCollector:
    """Collects rollouts, step by step; a context, whose processes end with it.

    Args:
        config: of the run.
        base_dir: folder that its relative paths start from.
        run_dir: for what rewards and environments print.
        parts: what the job was given.
        prompts: the data set.
        engine: this rank's engine.
        engines: its mesh.
        stall: when its generation counts as stalled.
    """

    def __init__(
        self,
        config: RLConfig,
        base_dir: Path,
        run_dir: Path,
        parts: Parts,
        prompts: Sequence[Prompt],
        engine: RolloutEngine,
        engines: EngineMesh,
        stall: StallLimit,
    ):
        rollout = config.rollout
        self._config, self._base_dir, self._parts = config, base_dir, parts
        self._engine, self._engines, self._stall = engine, engines, stall
        self._sampling = sampling_params(rollout, parts.stop_token_ids())
        self._sampler = PromptSampler(
            len(prompts), rollout.num_prompts_per_step, config.seed, config.data.shuffle
        )
        self._long_tail = LongTail(
            rollout.long_tail, self._sampler, prompts, self._engines.num_replicas
        )
        self.environment = parts.environment(rollout, config.sandbox, engines, run_dir)
        self.suite = RewardSuite(
            config.rewards,
            group_size=rollout.group_size,
            config=config.reward_suite,
            sandbox=config.sandbox,
            base_dir=base_dir,
            log_path=run_dir / f"rewards_{parts.mesh.rank}.log",
        )
        self._told_faults: set[str] = set()
        self._open = ExitStack()
        if engines.tp_rank == 0:
            self.suite.start()  # its processes get ready while the run is
            if self.environment is not None:
                self.environment.start()

    @property
    def epoch(self) -> int:
        """Passes over the data set that are over."""
        return self._sampler.epoch

    def collect(self, step: int, advantage: AdvantageConfig, display: ProgressDisplay) -> Collected:
        """Sample the rollouts of a step, in several rounds where groups are filtered; collective.

        Args:
            step: names the noise of its new groups.
            advantage: what a filter on advantages computes them by.
            display: for progress.

        Raises:
            EngineFailure: see `run_groups`.
        """
        began = time.perf_counter()
        config, dynamic = self._config, self._config.dynamic_sampling
        filtering = dynamic.filter != "none"
        refill = Refill(config.rollout.num_prompts_per_step, dynamic.max_rounds if filtering else 1)
        prompts: list[Prompt] = []
        rounds: list[RolloutBatch] = []
        kept: list[int] = []
        while num_groups := refill.num_wanted():
            asked = self._long_tail.ask(step, num_groups, first_group=len(prompts))
            batch = run_groups(
                asked,
                group_size=config.rollout.group_size,
                sampling=self._sampling,
                engine=self._engine,
                engines=self._engines,
                suite=self.suite,
                platform=self._parts.platform,
                seed=config.seed,
                stream="train",
                first_group=len(prompts),
                num_wanted=num_groups,
                long_tail=config.rollout.long_tail,
                environment=self.environment,
                stall=self._stall,
                on_progress=display.progress,
                on_generated=lambda: display.phase("reward"),
            )
            self._long_tail.settle(asked, batch.cut)
            prompts += [asked[g].prompt for g in batch.cut.kept]
            rounds.append(batch)
            if not filtering:
                kept = list(range(len(prompts)))
                break
            kept += refill.add(
                decide_groups(batch.rewards, dynamic, advantage, base_dir=self._base_dir)
            )
        whole = RolloutBatch.joined(rounds)
        self._report_faults(whole)
        metrics = rollout_metrics(whole, time.perf_counter() - began)
        if filtering:
            metrics |= {f"dynamic_sampling/{k}": v for k, v in refill.metrics().items()}
        if config.rollout.long_tail.is_cut:
            metrics |= long_tail_metrics(whole)
        if self.environment is not None:
            metrics |= environment_metrics(whole)
        return Collected(prompts=prompts, batch=whole, kept=kept, metrics=metrics)

    def _report_faults(self, batch: RolloutBatch) -> None:
        """Show the first traceback of each reward that raises, and of the environment, once."""
        faults = {
            f"reward '{name}' raised; such rollouts have no value of it": traceback
            for name, traceback in batch.report.tracebacks.items()
        }
        if batch.environment.traceback:
            raised = "the environment raised; such rollouts have no reward"
            faults[raised] = batch.environment.traceback
        for what, traceback in faults.items():
            if what not in self._told_faults and self._parts.mesh.rank == 0:
                self._told_faults.add(what)
                print(f"{what}\n{traceback}", file=sys.stderr, flush=True)

    # ---- going on ----------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], tuple[GroupRequest, ...]]:
        """Where it is between two steps, for `restore`."""
        return self._sampler.state_dict(), self._long_tail.carried

    def restore(self, state: tuple[dict[str, Any], tuple[GroupRequest, ...]]) -> None:
        """Go back there: the next step asks for the same rollouts again."""
        sampler, self._long_tail.carried = state
        self._sampler.load_state_dict(sampler)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it on every rank alike."""
        return {"sampler": self._sampler.state_dict()}

    def own_state(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps of this rank's own: carried groups."""
        return self._long_tail.own_state(self._engines)

    def load_state(self, state: dict[str, Any], carried: list[dict[str, Any]]) -> None:
        """Go on from a checkpoint.

        Args:
            state: with what `state_dict` returned.
            carried: what `own_state` returned, of all ranks.
        """
        self._sampler.load_state_dict(state["sampler"])
        self._long_tail.load_carried(
            carried,
            replica=self._engines.replica,
            group_size=self._config.rollout.group_size,
            max_completion_tokens=self._config.rollout.max_completion_tokens,
        )

    def __enter__(self) -> RolloutCollector:
        self._open.enter_context(self.suite)
        if self.environment is not None:
            self._open.enter_context(self.environment)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()
