"""A Megatron GPTModel of one architecture: built, loaded, asked for log-probs, read out.

`MegatronModel` is what policy and reference have in common. How weights enter and leave it is in
weights.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from gdpo_megatron.config.memory import MemoryConfig
from gdpo_megatron.config.schema import MicroBatchConfig, ParallelConfig, PrecisionConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.pipeline import stage_layers
from gdpo_megatron.data.batching import FILLER_ROW_ID, MicroBatch
from gdpo_megatron.data.micro_batching import MicroBatching
from gdpo_megatron.distributed.mesh import Mesh
from gdpo_megatron.platform import Platform
from gdpo_megatron.policy.fp8 import ALIGNMENT
from gdpo_megatron.policy.fp8_linear import Fp8Mode
from gdpo_megatron.policy.head import LabelHead, LabelRequest
from gdpo_megatron.policy.layer_spec import block_spec
from gdpo_megatron.policy.megatron_api import build_gpt
from gdpo_megatron.policy.token_layout import PackedRows, PaddedRows, TokenLayout
from gdpo_megatron.policy.transformer_config import transformer_config
from gdpo_megatron.policy.weights import ShardedWeights


class MegatronModel(ShardedWeights):
    """One model over the trainer's mesh.

    Args:
        arch: shape of the model.
        max_sequence_length: longest row that will be seen.
        memory: what is kept and what is computed again; None means its defaults.
        fused_norms: see block_spec.
        packing: compute the rows of a micro-batch end to end, not side by side.
    """

    def __init__(
        self,
        arch: ModelArchitecture,
        *,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        max_sequence_length: int,
        mesh: Mesh,
        platform: Platform,
        memory: MemoryConfig | None = None,
        fused_norms: bool = True,
        packing: bool = False,
    ):
        self.arch, self.mesh, self.platform = arch, mesh, platform
        memory = memory or MemoryConfig()
        self.packing = packing
        self.config = transformer_config(arch, parallel, precision, memory, platform)
        self.fp8: Fp8Mode | None = None
        """Whether its layers multiply in FP8; None where they cannot."""
        if precision.fp8 is not None:
            self.fp8 = Fp8Mode(precision.fp8, mesh.tp_cp_group)
        self._layers_per_stage = stage_layers(arch.num_layers, parallel)
        self._fused_norms, self._max_sequence_length = fused_norms, max_sequence_length
        self._num_chunks = parallel.virtual_pipeline_model_parallel_size
        self.chunks = [self._build_chunk(index) for index in range(self._num_chunks)]
        self.modules: list[torch.nn.Module] = list(self.chunks)
        """The chunks in whatever is wrapped around them."""
        if self.config.bf16:
            self.modules = [Float16Module(self.config, chunk) for chunk in self.chunks]
        self._find_rows()
        self._head: LabelHead | None = None
        if mesh.is_last_stage:
            self._head = LabelHead(
                self.chunks[-1],
                vocab_size=arch.vocab_size,
                chunk_tokens=memory.logprob_chunk_tokens,
                group=mesh.tp_group,
            )

    def _build_chunk(self, chunk: int) -> GPTModel:
        arch, stage = self.arch, chunk * self.mesh.pp_size + self.mesh.pp_rank
        vp_stage = chunk if self._num_chunks > 1 else None
        # Megatron's annotation leaves out one of the two that it takes.
        spec: Any = block_spec(
            self.config,
            self.platform,
            fused_norms=self._fused_norms,
            vp_stage=vp_stage,
            fp8=self.fp8,
        )
        gpt = build_gpt(
            self.config,
            spec,
            vocab_size=arch.padded_vocab_size(self.mesh.tp_size),
            max_sequence_length=self._max_sequence_length,
            position_embedding_type="rope",
            rotary_base=int(arch.rope_theta),
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            pre_process=stage == 0,
            post_process=stage == len(self._layers_per_stage) - 1,
            parallel_output=True,
            vp_stage=vp_stage,
        ).to(self.platform.device)
        gpt.rotary_pos_emb.inv_freq = arch.inverse_frequencies().to(self.platform.device)
        return gpt

    @property
    def gpt(self) -> GPTModel:
        """The whole of this rank's part, where it is one chunk."""
        (chunk,) = self.chunks
        return chunk

    def train(self, mode: bool = True) -> None:
        """Set the mode of all modules, like torch's `Module.train`."""
        for module in self.modules:
            module.train(mode)

    def freeze(self) -> None:
        """Make it a model that is never updated."""
        self.train(False)
        for module in self.modules:
            module.requires_grad_(False)

    # ---- forward -----------------------------------------------------------------------------

    def run_logprobs(
        self,
        micro_batches: Sequence[MicroBatch],
        on_logprobs: Callable[[Tensor, Tensor, MicroBatch], Any],
        *,
        temperature: float,
        forward_only: bool,
    ) -> list[Any]:
        """Run Megatron's schedule (1F1B where there are stages) over micro-batches.

        Args:
            micro_batches: at least one; equal on all ranks of one model replica.
            on_logprobs: called on the last stage with (logprobs, entropy, micro_batch), float32
                [b, S] of the labels; see Megatron's loss function for what it returns; anything
                when forward_only.
            temperature: divides the logits.
            forward_only: no backward pass.

        Returns:
            What `on_logprobs` reported for each micro-batch on the last stage; [] elsewhere.
        """

        def forward(model: torch.nn.Module, batch: MicroBatch, layout: TokenLayout) -> Any:
            request = LabelRequest(layout.own(batch.labels), temperature)
            with nullcontext() if self._head is None else self._head.answers(request):
                output = _call(model, batch, layout)

            def finish(logprobs: Tensor, **_: Any) -> Any:
                assert request.entropy is not None
                return on_logprobs(layout.rows(logprobs), layout.rows(request.entropy), batch)

            return output, finish

        return self._run(micro_batches, forward, forward_only)

    def run_schedule(
        self, micro_batches: Sequence[MicroBatch], on_logits: Any, *, forward_only: bool
    ) -> list[Any]:
        """`run_logprobs` with the logits instead, all of a micro-batch at once.

        Args:
            micro_batches: as of run_logprobs.
            on_logits: called with (logits, micro_batch), the logits of this context-parallel rank's
                tokens and of this tensor-parallel rank's vocabulary.
            forward_only: no backward pass.
        """

        def forward(model: torch.nn.Module, batch: MicroBatch, layout: TokenLayout) -> Any:
            return _call(model, batch, layout), lambda logits, **_: on_logits(logits, batch)

        return self._run(micro_batches, forward, forward_only)

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        forward: Callable[[torch.nn.Module, MicroBatch, TokenLayout], Any],
        forward_only: bool,
    ) -> list[Any]:
        batches, shape = self._schedulable(micro_batches)

        def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> Any:
            batch = next(iterator).to(self.platform.device)
            return forward(model, batch, self._layout(batch, shape or self._shape_of(batch)))

        rows, columns = shape or self._shape_of(batches[0])
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.modules],
            model=self.modules,
            num_microbatches=len(batches),
            seq_length=columns,
            micro_batch_size=rows,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return results[: len(micro_batches)] if forward_only else results

    def _schedulable(
        self, micro_batches: Sequence[MicroBatch]
    ) -> tuple[Sequence[MicroBatch], tuple[int, int] | None]:
        """What the interleaved schedule asks for: a multiple of the stages, and one shape for all.

        What is added counts for nothing: its rows are masked.
        """
        if self._num_chunks == 1:
            return micro_batches, None
        last = micro_batches[-1]
        masked = replace(
            last,
            loss_mask=torch.zeros_like(last.loss_mask),
            row_ids=torch.full_like(last.row_ids, FILLER_ROW_ID),
        )
        missing = -len(micro_batches) % self.mesh.pp_size
        shapes = [self._shape_of(batch) for batch in micro_batches]
        rows, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
        return [*micro_batches, *[masked] * missing], (rows, columns)

    @property
    def length_multiple(self) -> int:
        """Tokens of a row, or of a pack, are padded to this, so that ranks can share them."""
        multiple = 2 * self.mesh.cp_size if self.mesh.cp_size > 1 else 1
        if self.config.sequence_parallel:
            multiple *= self.mesh.tp_size
        if self.fp8 is not None:
            # Padding is seen by the scales: the same in every layout whose multiple divides this.
            multiple = math.lcm(multiple, ALIGNMENT)
        return multiple

    def micro_batching(self, config: MicroBatchConfig) -> MicroBatching:
        """How rows are cut into micro-batches for this model."""
        return MicroBatching(
            micro_batch_size=config.micro_batch_size,
            max_tokens=config.max_tokens_per_micro_batch,
            packing=self.packing,
            pad_to_multiple_of=self.length_multiple,
            same_shape=self._num_chunks > 1,
            # Experts are asked by all data-parallel ranks that share them, layer by layer.
            same_number=self.mesh.ep_size > 1,
            hidden_size=self.arch.hidden_size,
        )

    def _shape_of(self, batch: MicroBatch) -> tuple[int, int]:
        """Rows and columns that the model computes for a micro-batch."""
        rows, columns = batch.tokens.shape
        if self.packing:
            rows, columns = 1, int(batch.lengths.sum())
        return rows, -(-columns // self.length_multiple) * self.length_multiple

    def padding_share(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Share of the positions that all ranks compute which no row takes; collective."""
        batches, shape = self._schedulable(micro_batches)
        computed = sum(math.prod(shape or self._shape_of(batch)) for batch in batches)
        taken = sum(batch.num_positions for batch in batches)
        counts = torch.tensor([taken, computed], dtype=torch.float64, device=self.platform.device)
        dist.all_reduce(counts)
        return 1.0 - float(counts[0] / counts[1])

    def _layout(self, batch: MicroBatch, shape: tuple[int, int]) -> TokenLayout:
        if self.packing:
            return PackedRows(batch, shape[1])
        return PaddedRows(batch, shape, self.mesh.cp_group)

    @torch.no_grad()
    def logprobs(
        self, micro_batches: Sequence[MicroBatch], temperature: float
    ) -> list[Tensor | None]:
        """Log-probs of the labels, float32 [b, S] per micro-batch; None off the last stage."""
        was_training = self.modules[0].training
        self.train(False)
        results = self.run_logprobs(
            micro_batches,
            lambda logprobs, *_: logprobs,
            temperature=temperature,
            forward_only=True,
        )
        self.train(was_training)
        return results or [None] * len(micro_batches)


def _call(model: torch.nn.Module, batch: MicroBatch, layout: TokenLayout) -> Tensor:
    tokens, positions = layout.own(batch.tokens), layout.own(batch.position_ids)
    return model(tokens, positions, None, packed_seq_params=layout.packed_seq_params)
