"""GDPO training: the loop, in the order of the paper.

    weight sync -> prompts, rollouts, rewards -> advantages -> log-probs -> update

Everything global is computed once from the whole step's batch and is the same on every rank; only
tokens are distributed. What each stage does is in the module that it calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdpo_megatron.algorithms import compute_advantages, needs_old_pass, needs_reference
from gdpo_megatron.build import Parts
from gdpo_megatron.checkpoint import CheckpointManager, goes_on_from, saved_after
from gdpo_megatron.collect import RolloutCollector
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import RLConfig
from gdpo_megatron.data.prompts import load_prompts
from gdpo_megatron.distributed.exchange import ExchangedTokens, exchange_tokens
from gdpo_megatron.errors import InputError
from gdpo_megatron.evaluation.evaluator import Evaluation, Evaluator
from gdpo_megatron.interrupt import Interrupt
from gdpo_megatron.observability.metrics import MetricsLogger, combine_minibatches
from gdpo_megatron.observability.profiling import StepProfiler
from gdpo_megatron.observability.progress import ProgressDisplay
from gdpo_megatron.observability.rollout_log import write_rollouts
from gdpo_megatron.observability.timers import PhaseTimers
from gdpo_megatron.planning.first_step import FirstStep
from gdpo_megatron.platform.memory import PhaseMemory
from gdpo_megatron.policy.megatron_policy import MegatronPolicy, WithoutAdapters
from gdpo_megatron.policy.model import MegatronModel
from gdpo_megatron.policy.parity_check import Fp8Drift, ParityGate
from gdpo_megatron.policy.swapped import SwappedReference
from gdpo_megatron.rewards.breaker import TooManyInvalid
from gdpo_megatron.rollout.failure import EngineFailure
from gdpo_megatron.rollout.long_tail import GroupRequest
from gdpo_megatron.rollout.runner import RolloutBatch
from gdpo_megatron.rollout.stall import StallLimit
from gdpo_megatron.step_metrics import (
    advantage_metrics,
    update_metrics,
)
from gdpo_megatron.types import AdvantageBatch, Prompt, RewardMatrix
from gdpo_megatron.update import (
    MinibatchPlan,
    PolicyLoss,
    RolloutMicroBatch,
    plan_minibatches,
    rollout_micro_batches,
)
from gdpo_megatron.weight_sync import (
    Canary,
    SyncFault,
    WeightSync,
    tolerance_of,
)


class GDPOTrainer:
    """One run. Construction is collective and resumes from the run folder.

    Args:
        config: the validated config.
        base_dir: folder that its relative paths start from.
        parts: what the job was given.
    """

    def __init__(self, config: RLConfig, base_dir: Path, parts: Parts):
        self.config, self.parts, self._base_dir = config, parts, base_dir
        self.run_dir = resolve_path(base_dir, config.run_dir)
        rollout, mesh = config.rollout, parts.mesh
        assert config.data.train is not None, "validation requires data.train"
        self.prompts = load_prompts(
            config.data,
            parts.tokenizer,
            path=config.data.train,
            base_dir=base_dir,
            max_prompt_tokens=config.model.max_sequence_length - rollout.max_completion_tokens,
        )
        # Before the models: an engine says at once what it cannot run. Asleep, it takes no memory.
        self.engine, self.engines = parts.engine(rollout, rollout.max_concurrent_sequences)
        self.engine.sleep()
        self.policy = MegatronPolicy(
            parts.arch,
            optimizer=config.optimizer,
            total_updates=config.train.num_steps * config.train.num_minibatches_per_step,
            make_reader=parts.reader,
            lora=config.model.lora,
            seed=config.seed,
            packing=config.train.packing,
            **parts.model_kwargs(),
        )
        self.batching = self.policy.micro_batching(config.train)
        self.reference: MegatronModel | WithoutAdapters | SwappedReference | None = None
        if needs_reference(config.loss):
            # A LoRA policy still holds the model that it started from: no second one is needed.
            if self.policy.lora is not None:
                self.reference = self.policy.without_adapters()
            elif config.memory.reference == "swap":
                self.reference = SwappedReference(self.policy)
            else:
                self.reference = parts.frozen_model(config.train.packing)
        self.parity = ParityGate(config.precision.fp8, self.policy, self.reference)
        self.stall = StallLimit(
            seconds=rollout.stall_timeout_seconds,
            folder=self.run_dir,
            goes_on=lambda: goes_on_from(self.checkpoints.steps()),
        )
        self.weight_sync = WeightSync(
            config.weight_sync,
            self.policy,
            self.engine,
            Canary(
                config.weight_sync.canary,
                self.prompts,
                policy=self.policy,
                engine=self.engine,
                engines=self.engines,
                batching=self.batching,
                temperature=rollout.temperature,
                max_sequence_length=config.model.max_sequence_length,
                seed=config.seed,
                tolerance=tolerance_of(config.weight_sync.canary, config.precision.params_dtype),
            ),
            self.stall,
        )
        self.collector = RolloutCollector(
            config,
            base_dir,
            self.run_dir,
            parts,
            self.prompts,
            self.engine,
            self.engines,
            self.stall,
        )
        self.advantage_config = replace(config.advantage, weights=self.collector.suite.weights)
        self.evaluator = None
        if config.train.eval_interval:
            self.evaluator = Evaluator(
                config,
                base_dir,
                parts,
                self.engine,
                self.engines,
                self.stall,
                self.collector.environment,
            )
        self.checkpoints = CheckpointManager(
            self.run_dir,
            keep_last=config.checkpoint.keep_last,
            mesh=mesh,
            write_hf_files=parts.write_hf_files,
        )
        self.step = self.policy_version = 0
        state = self.checkpoints.load_latest(self.policy)
        if state is not None:
            self.step, self.policy_version = state["step"], state["policy_version"]
            self.collector.load_state(state, self.checkpoints.carried(self.step))
            self.parity.load_state_dict(state.get("parity", {}))
        self._free_grad_buffers()
        self.first_step = FirstStep(config, parts.arch, mesh, parts.platform)
        self.interrupt = Interrupt(parts.platform)
        self.profiler = StepProfiler(config.profiling, self.run_dir, mesh.rank)
        self.timers = PhaseTimers(synchronize=parts.platform.synchronize)
        self.memory = PhaseMemory(parts.platform.memory_probe())
        self.metrics = MetricsLogger(
            self.run_dir,
            tensorboard=config.logging.tensorboard,
            enabled=mesh.rank == 0,
            start_step=self.step + 1,
        )

    def run(self) -> bool:
        """Train to the last step.

        Returns:
            Whether the run is complete; False when it was interrupted, and saved.
        """
        train, save_interval = self.config.train, self.config.checkpoint.save_interval
        start, stopping = self.step, False
        title = f"gdpo-megatron train: {self.run_dir.name}"
        with (
            self.metrics,
            self.collector,
            self.profiler,
            self._display(title, start) as self.display,
        ):
            if start:
                self.display.message(f"resumed after step {start}")
            while self.step < train.num_steps and not stopping:
                began, broken, fault = time.perf_counter(), None, None
                with self.profiler.step(self.step + 1):
                    values, summary = self.train_step()
                self.step += 1
                if train.eval_interval and self.step % train.eval_interval == 0:
                    try:
                        evaluation = self._evaluate()
                        values |= evaluation.metrics()
                        broken = evaluation.broken
                    except EngineFailure as error:
                        broken = error
                    except SyncFault as error:
                        fault = error
                seconds = self.timers.take()
                values |= {f"time/{name}_seconds": s for name, s in seconds.items()}
                values["time/step_seconds"] = time.perf_counter() - began
                values |= self.memory.take()
                # Logged before it is saved: a step that a resumed run does not repeat is on record.
                self.metrics.log(self.step, values)
                if fault is not None:
                    raise self._unsynced(fault)
                stopping = self.interrupt.agreed()
                last = stopping or self.step == train.num_steps
                if last or (save_interval and self.step % save_interval == 0):
                    self._save()
                self.display.step_done(self.step, summary)
                for line in self.first_step.report(seconds, values["completion/mean_tokens"]):
                    self.display.message(line)
                for path in self.profiler.write():
                    self.display.message(f"profile: {path}")
                if broken is not None:
                    raise self._saved(broken)
            complete = self.step == train.num_steps
            if complete and self.config.checkpoint.export_hf:
                with self._phase("export"):
                    self.parts.export(self.policy, self.run_dir / "hf")
            if not complete:
                self.display.message(
                    f"interrupted and saved after step {self.step}; the same command goes on there"
                )
        return complete

    # ---- one step ----------------------------------------------------------------------------

    def train_step(self) -> tuple[dict[str, float], dict[str, float]]:
        """Take one step; returns its metrics, and those that a person watches."""
        before = self.collector.state()
        with self._phase("weight_sync"):
            try:
                sync = self.weight_sync.run(self.policy_version)
            except SyncFault as error:
                raise self._unsynced(error) from None
        with self._phase("rollout"):
            try:
                collected = self.collector.collect(self.step, self.advantage_config, self.display)
                self.weight_sync.release()
            except EngineFailure as error:
                raise self._undone(error, before) from None
        batch, values = collected.batch, collected.metrics
        try:
            batch.check_invalid(self.config.reward_suite.max_invalid_fraction)
        except TooManyInvalid as error:
            raise self._undone(error, before) from None
        with self._phase("advantage"):
            advantages = self._advantages(batch, collected.kept, values)
        values |= {"run/policy_version": sync.policy_version, "run/epoch": self.collector.epoch}
        values |= sync.metrics()
        self._log_rollouts(batch, advantages)
        try:
            values |= self._update(collected.prompts, batch, advantages)
        except Fp8Drift as error:
            self.metrics.log(self.step + 1, values | error.metrics | self.parity.metrics())
            raise self._undone(error, before) from None
        summary = {name: values[f"reward/{name}/mean"] for name in self.collector.suite.names}
        summary["tokens/s"] = values["rollout/tokens_per_second"]
        return values, summary

    def _unsynced(self, error: SyncFault) -> InputError:
        """Save the run before it ends because the engine has not got the policy's weights."""
        if error.weights_are_finite:
            return self._saved(error)
        steps = self.checkpoints.steps()
        last = f"the last one is of step {steps[-1]}" if steps else "there is none"
        return InputError([*error.problems, f"no checkpoint is made of them; {last}"])

    def _advantages(
        self, batch: RolloutBatch, kept: Sequence[int], values: dict[str, float]
    ) -> AdvantageBatch:
        """Advantages of the kept groups, 0 and out of the loss for the others; adds its metrics."""
        matrix = batch.rewards
        rows = torch.isin(matrix.group_ids, torch.tensor(kept, dtype=torch.int64)).nonzero()[:, 0]
        row_of = {sample: row for row, sample in enumerate(rows.tolist())}
        trained = RewardMatrix(
            matrix.names,
            matrix.values[rows],
            matrix.valid[rows],
            matrix.group_ids[rows],
            {(row_of[s], name): why for (s, name), why in batch.reasons.items() if s in row_of},
        )
        num_tokens = batch.num_loss_tokens[rows]
        result = compute_advantages(
            trained, self.advantage_config, num_tokens, base_dir=self._base_dir
        )
        values |= advantage_metrics(trained, result, num_tokens, self.advantage_config)

        def spread(part: Tensor) -> Tensor:
            whole = part.new_zeros(len(matrix.group_ids), *part.shape[1:])
            whole[rows] = part
            return whole

        return AdvantageBatch(
            advantages=spread(result.advantages),
            per_reward=spread(result.per_reward),
            combined=spread(result.combined),
            stats=result.stats,
            loss_rows=spread(result.loss_rows),
        )

    def _update(
        self, prompts: Sequence[Prompt], batch: RolloutBatch, advantages: AdvantageBatch
    ) -> dict[str, float]:
        """Train on the step's rollouts; returns the metrics of its minibatches."""
        config, mesh = self.config, self.parts.mesh
        lengths = batch.lengths.tolist()
        plans = plan_minibatches(
            advantages.loss_rows,
            [len(prompt.token_ids) for prompt in prompts],
            lengths,
            num_loss_tokens=batch.num_loss_tokens.tolist(),
            group_size=config.rollout.group_size,
            num_minibatches=config.train.num_minibatches_per_step,
            dp_size=mesh.dp_size,
            hidden_size=self.parts.arch.hidden_size,
        )
        with self._phase("exchange"):
            tokens = self._exchange(batch, [p.samples for p in plans], lengths)
            minibatches = [
                rollout_micro_batches(
                    plan,
                    tokens,
                    prompts,
                    advantages.advantages,
                    group_size=config.rollout.group_size,
                    batching=self.batching,
                    dp_rank=mesh.dp_rank,
                )
                for plan in plans
            ]
        checked = self._check_parity(plans, minibatches)
        with self._phase("logprobs"):
            minibatches = [self._with_logprobs(batches) for batches in minibatches]
        results: list[dict[str, float]] = []
        with self._phase("update"):
            for plan, micro_batches in zip(plans, minibatches, strict=True):
                if not plan.num_loss_rows:
                    continue
                loss = PolicyLoss(config.loss, plan, config.rollout.max_completion_tokens)
                with self.first_step.watch(self.policy, micro_batches):
                    stats = self.policy.update(
                        micro_batches, loss, temperature=config.rollout.temperature
                    )
                self.policy_version += 1
                results.append(update_metrics(stats, loss))
            self._free_grad_buffers()
        return combine_minibatches(results) | checked | self.parity.metrics()

    def _free_grad_buffers(self) -> None:
        if self.config.memory.free_grad_buffers_during_rollout:
            self.policy.free_grad_buffers()

    def _check_parity(
        self, plans: Sequence[MinibatchPlan], minibatches: Sequence[Sequence[RolloutMicroBatch]]
    ) -> dict[str, float]:
        """Check FP8 on the step's first micro-batch, before anything is computed in it."""
        pairs = zip(plans, minibatches, strict=True)
        first = next((batches[0] for plan, batches in pairs if plan.num_loss_rows), None)
        if first is None or not self.parity.due(self.step):
            return {}
        with self._phase("parity_check"):
            metrics, message = self.parity.check(first, temperature=self.config.rollout.temperature)
        if message is not None:
            self.display.message(message)
        return metrics

    def _exchange(
        self, batch: RolloutBatch, samples: Sequence[Sequence[Sequence[int]]], lengths: list[int]
    ) -> dict[int, ExchangedTokens]:
        """Bring each sample that is trained on to the ranks that train on it."""
        dp_rank_of = [-1] * len(lengths)
        for ranks in samples:
            for dp_rank, ids in enumerate(ranks):
                for sample in ids:
                    dp_rank_of[sample] = dp_rank
        return exchange_tokens(
            {
                sample: (it.completion.token_ids, it.completion.logprobs, it.loss_mask())
                for sample, it in batch.rollouts.items()
            },
            lengths=lengths,
            replica_of=batch.replica_of,
            dp_rank_of=dp_rank_of,
            mesh=self.parts.mesh,
            engines=self.engines,
            device=self.parts.platform.device,
        )

    def _with_logprobs(self, batches: Sequence[RolloutMicroBatch]) -> list[RolloutMicroBatch]:
        """Add what the policy before the update and the reference say of the same tokens."""
        temperature = self.config.rollout.temperature
        filled = list(batches)
        if needs_old_pass(self.config.loss):
            old = self.policy.logprobs(filled, temperature)
            filled = [replace(b, old_logprobs=x) for b, x in zip(filled, old, strict=True)]
        if self.reference is not None:
            ref = self.reference.logprobs(filled, temperature)
            filled = [replace(b, ref_logprobs=x) for b, x in zip(filled, ref, strict=True)]
        return filled

    # ---- around it ---------------------------------------------------------------------------

    def _evaluate(self) -> Evaluation:
        assert self.evaluator is not None
        with self._phase("eval"):
            self.weight_sync.run(self.policy_version)
            result = self.evaluator.run(
                f"step_{self.step:08d}",
                {"step": self.step, "policy_version": self.policy_version},
                goes_on=False,
                on_progress=self.display.progress,
            )
            self.weight_sync.release()
        return result

    def _save(self) -> None:
        with self._phase("checkpoint"):
            self.checkpoints.save(
                self.step,
                self.policy,
                {
                    "policy_version": self.policy_version,
                    **self.collector.state_dict(),
                    "parity": self.parity.state_dict(),
                },
                self.collector.own_state(),
            )

    def _undone(
        self, error: InputError, before: tuple[dict[str, Any], tuple[GroupRequest, ...]]
    ) -> InputError:
        """Save the run as it was `before` a step of which nothing was learned.

        A run that goes on asks for the same rollouts again.
        """
        self.collector.restore(before)
        return self._saved(error)

    def _saved(self, error: InputError) -> InputError:
        """Save the run before it ends with an error that a person has to mend."""
        if self.step not in self.checkpoints.steps():
            self._save()
        return InputError([*error.problems, saved_after(self.step)])

    def _log_rollouts(self, batch: RolloutBatch, advantages: AdvantageBatch) -> None:
        """Write sampled groups; rank 0 leads an engine and writes its own first groups."""
        count = self.config.logging.num_rollout_groups
        if self.parts.mesh.rank != 0 or not count:
            return
        groups = sorted({rollout.group_id for rollout in batch.rollouts.values()})[:count]
        write_rollouts(
            self.run_dir,
            self.step + 1,
            {s: r for s, r in batch.rollouts.items() if r.group_id in groups},
            replace(batch.rewards, reasons=batch.reasons),
            advantages.advantages,
        )

    def _display(self, title: str, start: int) -> ProgressDisplay:
        return ProgressDisplay(
            self.config.train.num_steps, start, title, enabled=self.parts.mesh.rank == 0
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.display.phase(name)
        with self.profiler.phase(name), self.timers(name), self.memory(name):
            yield
