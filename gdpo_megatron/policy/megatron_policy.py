"""The policy: a MegatronModel that learns.

An update is one optimizer step over one minibatch, cut into micro-batches that run through
Megatron's schedule. The loss function gets log-probs and entropies and returns a sum that is
already divided by the global denominator, so gradients are only ever added: over micro-batches,
then over data-parallel ranks. No layout and no split can change what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor

from gdpo_megatron.config import schema
from gdpo_megatron.config.lora import LoraConfig
from gdpo_megatron.data.batching import MicroBatch
from gdpo_megatron.policy.lora import Lora
from gdpo_megatron.policy.megatron_api import build_config, set_fields
from gdpo_megatron.policy.model import MegatronModel
from gdpo_megatron.policy.optimizer import (
    build_optimizer,
    build_scheduler,
    clip_gradients,
    load_sharded_state,
    main_gradients,
    materialize_state,
    sharded_state,
)


class LossFn(Protocol):
    """What an update minimises."""

    @property
    def sums(self) -> tuple[str, ...]:
        """Statistics that are summed over all micro-batches and ranks."""
        ...

    @property
    def maxima(self) -> tuple[str, ...]:
        """Statistics of which the largest is kept."""
        ...

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss and statistics of one micro-batch.

        Args:
            logprobs: float32 [b, S] of the labels, at the run's temperature.
            entropy: float32 [b, S], in nats.
            batch: the micro-batch that they belong to.

        Returns:
            The micro-batch's part of the loss (scalar, divided by the global denominator) and its
            statistics (scalars, detached).
        """
        ...


class MegatronPolicy(MegatronModel):
    """A trainable model with its optimizer and schedule.

    Args:
        optimizer: AdamW, clipping and schedule.
        total_updates: optimizer steps of the whole run, for the schedule.
        make_reader: of the weights to start from.
        lora: train adapters only; None trains all weights.
        seed: of new adapters.
        **model: see MegatronModel.

    Attributes:
        around_gradients: made for each update, entered while it computes its gradients.
    """

    around_gradients: Callable[[], AbstractContextManager[object]] = nullcontext

    def __init__(
        self,
        *args: Any,
        optimizer: schema.OptimizerConfig,
        total_updates: int,
        make_reader: Callable[[], Any],
        lora: LoraConfig | None = None,
        seed: int = 0,
        **model: Any,
    ):
        # An adapter sees the input of its layer, and that must be the normalised one.
        super().__init__(*args, fused_norms=lora is None, **model)
        # The optimizer copies its main weights from the model: they must be there first.
        self.load_hf(make_reader())
        if lora is not None:
            self.lora = Lora(self.chunks, self.stage_rows, lora, mesh=self.mesh, seed=seed)
            if self.config.recompute_granularity is not None:
                self._ask_for_gradients()
        parallel: schema.ParallelConfig = model["parallel"]
        ddp_config = build_config(
            DistributedDataParallelConfig,
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        self.ddp = [
            DistributedDataParallel(self.config, ddp_config, module) for module in self.modules
        ]
        self.modules = list(self.ddp)
        if parallel.overlap_grad_reduce:
            # Only the last micro-batch's gradients are complete.
            no_sync: Any = [ddp.no_sync for ddp in self.ddp]
            set_fields(self.config, no_sync_func=no_sync if len(no_sync) > 1 else no_sync[0])
        self.optimizer = build_optimizer(optimizer, self.ddp)
        self.scheduler = build_scheduler(optimizer, self.optimizer, total_updates)
        set_fields(
            self.config,
            grad_scale_func=self.optimizer.scale_loss,
            # The denominator is the loss function's; Megatron's own division by tokens is left out.
            finalize_model_grads_func=lambda model, _tokens, **kw: finalize_model_grads(
                model, None, **kw
            ),
        )

    def update(
        self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn, *, temperature: float
    ) -> dict[str, float]:
        """Take one optimizer step.

        Args:
            micro_batches: this data-parallel rank's part of the minibatch; at least one, a rank
                without rows passes one of masked rows.
            loss_fn: what to minimise.
            temperature: of the log-probs.

        Returns:
            The loss function's statistics over the whole minibatch plus "grad_norm" (before
            clipping), "lr" and "padding_share", equal on all ranks.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are left as they were.
        """
        with self.around_gradients():
            reported = self._accumulate(micro_batches, loss_fn, temperature)
        stats = self._reduce_stats(reported, loss_fn)
        stats["padding_share"] = self.padding_share(micro_batches)
        # Before the step, not after it: the first one of a warmup would have a rate of 0.
        self.scheduler.step(1)
        stats["lr"] = float(self.optimizer.param_groups[0]["lr"])
        stats["grad_norm"] = clip_gradients(self.optimizer)
        if not math.isfinite(stats["grad_norm"]):
            raise FloatingPointError(
                f"gradient norm is {stats['grad_norm']}; loss statistics: {stats}"
            )
        self.optimizer.step_with_ready_grads()
        return stats

    def gradients(
        self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn, *, temperature: float
    ) -> list[Tensor]:
        """The gradient that `update` would clip and follow, and nothing is changed.

        Args:
            micro_batches: as of `update`.
            loss_fn: as of `update`.
            temperature: as of `update`.

        Returns:
            This rank's part, float32; see `main_gradients`.
        """
        self._accumulate(micro_batches, loss_fn, temperature)
        gradients = main_gradients(self.optimizer)
        self._clear_gradients()
        return gradients

    def _clear_gradients(self) -> None:
        for ddp in self.ddp:
            ddp.restore_grad_buffers()  # nothing, unless they were freed
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _accumulate(
        self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn, temperature: float
    ) -> list[Any]:
        """Forward and backward, reduced over ranks; returns what the last stage reports."""
        self.train()
        self._clear_gradients()

        def on_logprobs(
            logprobs: Tensor, entropy: Tensor, batch: MicroBatch
        ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, stats = loss_fn(logprobs, entropy, batch)
            return loss, torch.ones((), dtype=torch.int), dict(stats)

        return self.run_logprobs(
            micro_batches, on_logprobs, temperature=temperature, forward_only=False
        )

    def _reduce_stats(
        self, reported: Sequence[Mapping[str, Tensor]], loss_fn: LossFn
    ) -> dict[str, float]:
        """Add up over micro-batches and ranks; of a replica's last stage only one rank speaks."""
        device = self.platform.device
        sums = torch.zeros(len(loss_fn.sums), dtype=torch.float64, device=device)
        maxima = torch.full(
            (len(loss_fn.maxima),), float("-inf"), dtype=torch.float64, device=device
        )
        if self.mesh.tp_rank == self.mesh.cp_rank == 0:
            for stats in reported:
                sums += torch.stack([stats[name].double() for name in loss_fn.sums])
                if loss_fn.maxima:
                    own = torch.stack([stats[name].double() for name in loss_fn.maxima])
                    maxima = torch.maximum(maxima, own)
        dist.all_reduce(sums)
        if loss_fn.maxima:
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        return dict(zip(loss_fn.sums, sums.tolist(), strict=True)) | dict(
            zip(loss_fn.maxima, maxima.tolist(), strict=True)
        )

    def free_grad_buffers(self) -> None:
        """Give the gradients' memory back until the next update, which starts from 0 anyway."""
        for ddp in self.ddp:
            ddp.offload_grad_buffers()

    def _ask_for_gradients(self) -> None:
        """Let what is recomputed have gradients although what comes before it is frozen.

        Megatron's recomputation gives parameters a gradient only where an input has one.
        """
        for gpt in self.chunks:
            if gpt.pre_process:
                gpt.embedding.register_forward_hook(lambda *call: call[-1].requires_grad_())

    def without_adapters(self) -> WithoutAdapters:
        """The model that a LoRA run started from, in the same memory."""
        return WithoutAdapters(self)

    def _finish_param_gather(self) -> None:
        """Wait for parameters whose update is still on its way from the rank that made it."""
        for ddp in self.ddp:
            if ddp.ddp_config.overlap_param_gather:
                ddp.start_param_sync(force_sync=True)

    def sharded_state_dict(self, *, loading: bool) -> dict[str, Any]:
        """Model, optimizer and schedule as Megatron's distributed checkpoint takes them."""
        materialize_state(self.optimizer)
        self._finish_param_gather()
        model = {f"chunk{i}": gpt.sharded_state_dict() for i, gpt in enumerate(self.chunks)}
        return {
            "model": model,
            "optimizer": sharded_state(self.optimizer, model, loading=loading),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `sharded_state_dict` of a saved run held."""
        for i, gpt in enumerate(self.chunks):
            gpt.load_state_dict(state["model"][f"chunk{i}"])
        load_sharded_state(self.optimizer, state["optimizer"])
        self.scheduler.num_steps = 0  # it adds the steps that it loads to its own
        self.scheduler.load_state_dict(state["scheduler"])


class WithoutAdapters:
    """A LoRA policy as it was before training: the reference of its KL term.

    Args:
        policy: with adapters.
    """

    def __init__(self, policy: MegatronPolicy):
        assert policy.lora is not None
        self._policy, self._lora = policy, policy.lora

    def logprobs(
        self, micro_batches: Sequence[MicroBatch], temperature: float
    ) -> list[Tensor | None]:
        """As MegatronModel's."""
        with self._lora.switched_off():
            return self._policy.logprobs(micro_batches, temperature)
