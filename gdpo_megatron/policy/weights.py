"""What a rank holds of a model, and the way between that and whole Hugging Face tensors.

Weights enter and leave under their Hugging Face names through the one table in
conversion/mapping.py; every rank takes its own part, so a model has the same weights in every
layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from gdpo_megatron.config.weight_sync import WeightSyncConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.layouts import Layout
from gdpo_megatron.conversion.mapping import Row, mapping_rows
from gdpo_megatron.distributed.mesh import Mesh
from gdpo_megatron.platform import Platform
from gdpo_megatron.policy.weight_stream import StreamedRow, WeightStream

if TYPE_CHECKING:  # which builds on the model
    from gdpo_megatron.policy.lora import Lora

BUCKET_BYTES = WeightSyncConfig.bucket_mb * 2**20


class TensorReader(Protocol):
    """Where weights come from: a checkpoint, or new ones."""

    def get(self, name: str) -> Tensor:
        """The full tensor of a Hugging Face name."""
        ...


class ShardedWeights:
    """The weights of a model over the trainer's mesh; the part of MegatronModel that has them."""

    arch: ModelArchitecture
    mesh: Mesh
    platform: Platform
    config: TransformerConfig
    chunks: list[GPTModel]
    """This rank's part of the model: one for each of its virtual pipeline stages."""

    stage_rows: list[tuple[Row, torch.nn.Parameter]]
    """The rows of the mapping that this rank holds, with their parameters."""

    lora: Lora | None = None
    """Adapters that belong to the weights."""

    _layers_per_stage: Sequence[int]
    """Of all stages, in the order that a token passes them."""

    def _find_rows(self) -> None:
        """Match the chunks' parameters with the mapping."""
        self.stage_rows = [
            pair for chunk in range(len(self.chunks)) for pair in self._rows_of(chunk)
        ]
        self._stream = WeightStream(
            self.arch, self.mesh, self.config.params_dtype, self.platform.device
        )

    def _stage_of(self, row: Row) -> int:
        """Pipeline stage that holds a row, counted in the order that a token passes them."""
        if row.layer is None:
            return len(self._layers_per_stage) - 1 if row.last else 0
        stage, first = 0, 0
        while row.layer >= first + self._layers_per_stage[stage]:
            first += self._layers_per_stage[stage]
            stage += 1
        return stage

    def _rows_of(self, chunk: int) -> Iterator[tuple[Row, torch.nn.Parameter]]:
        stage = chunk * self.mesh.pp_size + self.mesh.pp_rank
        first_layer = sum(self._layers_per_stage[:stage])
        parameters = dict(self.chunks[chunk].named_parameters())
        for row in mapping_rows(self.arch):
            # A tied output layer is a parameter of its own only where the embedding is not at hand.
            if self._stage_of(row) != stage or (row.import_only and self.mesh.pp_size == 1):
                continue
            ep_rank, expert = self._place_of_expert(row)
            if ep_rank not in (None, self.mesh.ep_rank):
                continue
            prefix = "" if row.layer is None else f"decoder.layers.{row.layer - first_layer}."
            possible = [prefix + name.replace("{expert}", str(expert)) for name in row.megatron]
            names = [name for name in possible if name in parameters]
            assert len(names) == 1, f"{row.megatron} has {len(names)} parameters on stage {stage}"
            yield row, parameters.pop(names[0])
        assert not parameters, f"parameters without a row in the mapping: {sorted(parameters)}"

    def _place_of_expert(self, row: Row) -> tuple[int | None, int]:
        """(expert-parallel rank, number there) of a row's expert; (None, 0) of other rows."""
        if row.expert is None or self.arch.moe is None:
            return None, 0
        return divmod(row.expert, self.arch.moe.num_experts // self.mesh.ep_size)

    def shard_group(self, row: Row) -> ProcessGroup:
        """The ranks that share a row's parameter, where its layout cuts it."""
        return self.mesh.tp_group if row.expert is None else self.mesh.etp_group

    # ---- in and out --------------------------------------------------------------------------

    @torch.no_grad()
    def load_hf(self, reader: TensorReader) -> None:
        """Fill this rank's parameters from full Hugging Face tensors."""
        for row, parameter in self.stage_rows:
            full = row.layout.merge([reader.get(n) for n in row.hf], self.arch, self.mesh.tp_size)
            group = self.shard_group(row)
            parameter.copy_(row.layout.shard(full, group.rank(), group.size()))

    @torch.no_grad()
    def own_shards(self) -> Iterator[tuple[Row, Tensor]]:
        """What this rank holds of every Hugging Face tensor, adapters merged, in layer order."""
        self._finish_param_gather()
        for row, parameter in self.stage_rows:
            if not row.import_only:
                yield row, self._merged(row, parameter)

    @torch.no_grad()
    def hf_tensors(self, bucket_bytes: int = BUCKET_BYTES) -> Iterator[tuple[str, Tensor]]:
        """All weights under their Hugging Face names, whole, in layer order; on every rank.

        Collective over the trainer's mesh, in buckets (see weight_stream.py). A tensor may be a
        view of the parameter: copy what outlives the next update. Adapters are merged into it, and
        the model is left as it is.

        Args:
            bucket_bytes: of whole tensors that are under way at a time.
        """
        self._finish_param_gather()
        own = {row.hf: parameter for row, parameter in self.stage_rows if not row.import_only}
        rows = [row for row in mapping_rows(self.arch) if not row.import_only]
        streamed = (
            self._streamed(
                row,
                row.layout,
                partial(self._merged, row, own[row.hf]) if row.hf in own else None,
                row.shapes,
            )
            for row in rows
        )
        for row, tensors in zip(rows, self._stream.whole(streamed, bucket_bytes), strict=True):
            yield from zip(row.hf, tensors, strict=True)

    @torch.no_grad()
    def whole_tensors(
        self,
        row: Row,
        layout: Layout,
        shard: Tensor | None,
        shapes: Sequence[tuple[int, ...]],
    ) -> list[Tensor]:
        """Whole tensors of the ranks that hold a row, on every rank; collective over the mesh.

        Args:
            row: says which pipeline stage and expert-parallel rank holds them.
            layout: between what is held there and the tensors.
            shard: this rank's part, of the model's dtype; None where the row is not held.
            shapes: of the tensors.

        Returns:
            The tensors; where ranks share nothing, views of the shard.
        """
        held = None if shard is None else shard.detach
        streamed = self._streamed(row, layout, held, tuple(shapes))
        (tensors,) = self._stream.whole([streamed], BUCKET_BYTES)
        return tensors

    def _finish_param_gather(self) -> None:
        """Wait for parameters that are still on their way here; a frozen model has none."""

    def _merged(self, row: Row, parameter: Tensor) -> Tensor:
        """This rank's part of a row as it takes effect."""
        adapter = self.lora.adapter(row) if self.lora is not None else None
        return parameter.detach() if adapter is None else adapter.merged(parameter)

    def _streamed(
        self,
        row: Row,
        layout: Layout,
        shard: Callable[[], Tensor] | None,
        shapes: tuple[tuple[int, ...], ...],
    ) -> StreamedRow:
        return StreamedRow(
            layout=layout,
            shapes=shapes,
            pp_rank=self._stage_of(row) % self.mesh.pp_size,  # virtual stages go round the ranks
            ep_rank=self._place_of_expert(row)[0],
            shard=shard,
        )
