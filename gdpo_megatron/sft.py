"""Supervised fine-tuning on the policy's own code: what RL starts from.

The loss is the mean cross-entropy of completion tokens over the whole global batch, so it is the
same for every layout and micro-batch size, as in RL.
"""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor

from gdpo_megatron.build import Parts
from gdpo_megatron.checkpoint import CheckpointManager, saved_after
from gdpo_megatron.config.paths import resolve_path
from gdpo_megatron.config.schema import SFTConfig
from gdpo_megatron.data.batching import MicroBatch, make_micro_batches
from gdpo_megatron.data.micro_batching import assign_rows, sequence_cost
from gdpo_megatron.data.prompts import load_sft_rows
from gdpo_megatron.data.sampler import PromptSampler
from gdpo_megatron.errors import InputError
from gdpo_megatron.interrupt import Interrupt
from gdpo_megatron.observability.metrics import MetricsLogger
from gdpo_megatron.observability.profiling import StepProfiler
from gdpo_megatron.observability.progress import ProgressDisplay
from gdpo_megatron.planning.first_step import FirstStep
from gdpo_megatron.policy.megatron_policy import MegatronPolicy
from gdpo_megatron.policy.parity_check import Fp8Drift, ParityGate


class CrossEntropy:
    """Mean negative log-prob of the completion tokens of a global batch.

    Args:
        num_loss_tokens: completion tokens of the batch, over all ranks.
    """

    sums = ("loss",)
    maxima = ()

    def __init__(self, num_loss_tokens: int):
        self._num_loss_tokens = num_loss_tokens

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the loss."""
        loss = -(logprobs * batch.loss_mask).sum() / self._num_loss_tokens
        return loss, {"loss": loss.detach()}


def run_sft(config: SFTConfig, base_dir: Path, parts: Parts) -> bool:
    """The `sft` job; resumes from the run folder. Returns whether it is complete."""
    run_dir, mesh, train = resolve_path(base_dir, config.run_dir), parts.mesh, config.train
    assert config.data.train is not None, "validation requires data.train"
    rows = load_sft_rows(
        config.data,
        parts.tokenizer,
        path=config.data.train,
        base_dir=base_dir,
        max_sequence_length=config.model.max_sequence_length,
    )
    sampler = PromptSampler(len(rows), train.global_batch_size, config.seed, config.data.shuffle)
    policy = MegatronPolicy(
        parts.arch,
        optimizer=config.optimizer,
        total_updates=train.num_steps,
        make_reader=parts.reader,
        lora=config.model.lora,
        seed=config.seed,
        packing=train.packing,
        **parts.model_kwargs(),
    )
    batching = policy.micro_batching(train)
    parity = ParityGate(config.precision.fp8, policy)
    first_step = FirstStep(config, parts.arch, mesh, parts.platform)
    checkpoints = CheckpointManager(
        run_dir,
        keep_last=config.checkpoint.keep_last,
        mesh=mesh,
        write_hf_files=parts.write_hf_files,
    )
    state = checkpoints.load_latest(policy)
    step = 0 if state is None else int(state["step"])
    if state is not None:
        sampler.load_state_dict(state["sampler"])
        parity.load_state_dict(state.get("parity", {}))
    interrupt, interval = Interrupt(parts.platform), config.checkpoint.save_interval
    leads, stopping = mesh.rank == 0, False
    logger = MetricsLogger(
        run_dir, tensorboard=config.logging.tensorboard, enabled=leads, start_step=step + 1
    )

    def save() -> None:
        display.phase("checkpoint")
        loop = {"sampler": sampler.state_dict(), "parity": parity.state_dict()}
        checkpoints.save(step, policy, loop)

    title = f"gdpo-megatron sft: {run_dir.name}"
    profiler = StepProfiler(config.profiling, run_dir, mesh.rank)
    display = ProgressDisplay(train.num_steps, step, title, enabled=leads)
    with logger, display, profiler:
        if step:
            display.message(f"resumed after step {step}")
        while step < train.num_steps and not stopping:
            began = time.perf_counter()
            display.phase("update")
            sampler_state = sampler.state_dict()
            batch = [rows[i] for i in sampler.next_batch()]
            lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in batch]
            costs = [sequence_cost(length, parts.arch.hidden_size) for length in lengths]
            ranks = assign_rows(costs, mesh.dp_size)
            own = [batch[i] for i in ranks[mesh.dp_rank]]
            micro_batches = make_micro_batches(
                [(r.prompt_ids, r.completion_ids) for r in own],
                batching,
                peers=[[lengths[i] for i in ids] for ids in ranks],
            )
            num_tokens = sum(len(r.completion_ids) for r in batch)
            loss, checked = CrossEntropy(num_tokens), dict[str, float]()
            if parity.due(step):
                display.phase("parity_check")
                try:
                    checked, message = parity.check(micro_batches[0], temperature=1.0)
                except Fp8Drift as error:
                    logger.log(step + 1, error.metrics | parity.metrics())
                    sampler.load_state_dict(sampler_state)
                    if step not in checkpoints.steps():
                        save()
                    raise InputError([*error.problems, saved_after(step)]) from None
                if message is not None:
                    display.message(message)
                display.phase("update")
            with (
                profiler.step(step + 1),
                profiler.phase("update"),
                first_step.watch(policy, micro_batches),
            ):
                stats = policy.update(micro_batches, loss, temperature=1.0)
            step += 1
            seconds = time.perf_counter() - began
            logger.log(
                step,
                {
                    "sft/loss": stats["loss"],
                    "sft/tokens_per_second": num_tokens / seconds,
                    "sft/padding_share": stats["padding_share"],
                    "optimizer/lr": stats["lr"],
                    "optimizer/grad_norm": stats["grad_norm"],
                    "time/step_seconds": seconds,
                    "run/epoch": sampler.epoch,
                    **checked,
                    **parity.metrics(),
                },
            )
            stopping = interrupt.agreed()
            if stopping or step == train.num_steps or (interval and step % interval == 0):
                save()
            display.step_done(step, {"loss": stats["loss"], "tokens/s": num_tokens / seconds})
            for line in first_step.report({"update": seconds}):
                display.message(line)
            for path in profiler.write():
                display.message(f"profile: {path}")
        if step == train.num_steps and config.checkpoint.export_hf:
            display.phase("export")
            parts.export(policy, run_dir / "hf")
        if step < train.num_steps:
            display.message(f"interrupted and saved after step {step}; the same command goes on")
    return step == train.num_steps
