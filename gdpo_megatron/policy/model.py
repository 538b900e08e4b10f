"""A Megatron GPTModel of one architecture: built, loaded, asked for log-probs, read out.

`MegatronModel` is what policy and reference have in common. Weights enter and leave under their
Hugging Face names through the one table in conversion/mapping.py; every rank takes its own part,
so a model has the same weights in every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.distributed import ProcessGroup

from gdpo_megatron.config.schema import ParallelConfig, PrecisionConfig
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.layouts import Layout
from gdpo_megatron.conversion.mapping import Row, mapping_rows
from gdpo_megatron.conversion.pipeline import stage_layers
from gdpo_megatron.data.batching import MicroBatch
from gdpo_megatron.distributed.mesh import Mesh
from gdpo_megatron.platform import Platform
from gdpo_megatron.policy.context_parallel import gather_rows, own_tokens
from gdpo_megatron.policy.layer_spec import block_spec
from gdpo_megatron.policy.logprobs import logprobs_and_entropy
from gdpo_megatron.policy.lora import Lora


class TensorReader(Protocol):
    """Where weights come from: a checkpoint, or new ones."""

    def get(self, name: str) -> Tensor:
        """The full tensor of a Hugging Face name."""
        ...


ForwardFn = Callable[[Tensor, Tensor, MicroBatch], Any]


def transformer_config(
    arch: ModelArchitecture,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    platform: Platform,
) -> TransformerConfig:
    """Megatron's config for an architecture in a layout."""
    dtype = getattr(torch, precision.params_dtype)
    layers = stage_layers(arch.num_layers, parallel)
    pp = parallel.pipeline_model_parallel_size
    layout = None
    if len(set(layers)) > 1 or parallel.pipeline_model_parallel_layout:
        stages = [["decoder"] * n for n in layers]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        layout = stages
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.intermediate_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_key_value_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.has_qkv_bias,
        qk_layernorm=arch.has_qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        pipeline_model_parallel_size=pp,
        pipeline_model_parallel_layout=layout,  # pyright: ignore[reportArgumentType]
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Micro-batches differ in rows and length: the stages tell each other the shapes.
        variable_seq_lengths=pp > 1,
        **_moe_options(arch, parallel),
        # Losses arrive divided by the global token count; Megatron must only sum gradients.
        calculate_per_token_loss=True,
        **platform.model_overrides,
    )


def _moe_options(arch: ModelArchitecture, parallel: ParallelConfig) -> dict[str, Any]:
    # Megatron checks the dispatcher for dense models too when shapes vary.
    options: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    if arch.moe is None:
        return options
    return options | {
        "num_moe_experts": arch.moe.num_experts,
        "moe_ffn_hidden_size": arch.moe.intermediate_size,
        "moe_router_topk": arch.moe.top_k,
        # A softmax over the chosen logits alone is the normalised form.
        "moe_router_pre_softmax": not arch.moe.normalize_top_k,
        # A term of pre-training; here it would pull against the rewards.
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
    }


class MegatronModel:
    """One model over the trainer's mesh.

    Args:
        arch: shape of the model.
        max_sequence_length: longest row that will be seen.
        fused_norms: see block_spec.
    """

    lora: Lora | None = None
    """Adapters that belong to the weights."""

    def __init__(
        self,
        arch: ModelArchitecture,
        *,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        max_sequence_length: int,
        mesh: Mesh,
        platform: Platform,
        fused_norms: bool = True,
    ):
        self.arch, self.mesh, self.platform = arch, mesh, platform
        self.config = transformer_config(arch, parallel, precision, platform)
        self._layers_per_stage = stage_layers(arch.num_layers, parallel)
        # Megatron's annotation leaves out one of the two that it takes.
        spec: Any = block_spec(self.config, platform, fused_norms=fused_norms)
        self.gpt = GPTModel(
            self.config,
            spec,
            vocab_size=arch.padded_vocab_size(mesh.tp_size),
            max_sequence_length=max_sequence_length,
            position_embedding_type="rope",
            rotary_base=int(arch.rope_theta),
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            pre_process=mesh.pp_rank == 0,
            post_process=mesh.is_last_stage,
            parallel_output=True,
        ).to(platform.device)
        self.gpt.rotary_pos_emb.inv_freq = arch.inverse_frequencies().to(platform.device)
        self.module: torch.nn.Module = self.gpt
        if self.config.bf16:
            self.module = Float16Module(self.config, self.gpt)
        self.stage_rows = list(self._rows_of_stage(mesh.pp_rank))

    # ---- weights -----------------------------------------------------------------------------

    def stage_of(self, row: Row) -> int:
        """Pipeline stage that holds a row."""
        if row.layer is None:
            return self.mesh.pp_size - 1 if row.last else 0
        stage, first = 0, 0
        while row.layer >= first + self._layers_per_stage[stage]:
            first += self._layers_per_stage[stage]
            stage += 1
        return stage

    def _rows_of_stage(self, stage: int) -> Iterator[tuple[Row, torch.nn.Parameter]]:
        first_layer = sum(self._layers_per_stage[:stage])
        parameters = dict(self.gpt.named_parameters())
        for row in mapping_rows(self.arch):
            # A tied output layer is a parameter of its own only where the embedding is not at hand.
            if self.stage_of(row) != stage or (row.import_only and self.mesh.pp_size == 1):
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

    @torch.no_grad()
    def load_hf(self, reader: TensorReader) -> None:
        """Fill this rank's parameters from full Hugging Face tensors."""
        mesh = self.mesh
        for row, parameter in self.stage_rows:
            full = row.layout.merge([reader.get(n) for n in row.hf], self.arch, mesh.tp_size)
            group = self._shard_group(row)
            parameter.copy_(row.layout.shard(full, group.rank(), group.size()))

    @torch.no_grad()
    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights under their Hugging Face names, whole, in layer order; on every rank.

        Collective over the trainer's mesh: each tensor is gathered over TP where it is held, and
        broadcast to the other expert-parallel ranks and stages, one row at a time. A yielded tensor
        may be a view of the parameter: copy what outlives the next update. Adapters are merged into
        it, and the model is left as it is.
        """
        own = {row.hf: parameter for row, parameter in self.stage_rows if not row.import_only}
        for row in mapping_rows(self.arch):
            if row.import_only:
                continue
            shard = own.get(row.hf)
            if shard is not None and self.lora and (adapter := self.lora.adapter(row)):
                shard = adapter.merged(shard)
            tensors = self.whole_tensors(row, row.layout, shard, row.shapes)
            yield from zip(row.hf, tensors, strict=True)

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
            shard: this rank's part; None where the row is not held.
            shapes: of the tensors.

        Returns:
            The tensors; where TP ranks share nothing, views of the shard.
        """
        mesh = self.mesh
        stage, (ep_rank, _) = self.stage_of(row), self._place_of_expert(row)
        if shard is not None:
            full = self._unshard(layout, shard.detach(), self._shard_group(row))
            tensors = [t.contiguous() for t in layout.split(full, self.arch)]
        else:
            dtype, device = self.config.params_dtype, self.platform.device
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        if ep_rank is not None and mesh.ep_size > 1 and stage == mesh.pp_rank:
            source = dist.get_global_rank(mesh.ep_group, ep_rank)
            for tensor in tensors:
                dist.broadcast(tensor, source, group=mesh.ep_group)
        if mesh.pp_size > 1:
            source = dist.get_global_rank(mesh.pp_group, stage)
            for tensor in tensors:
                dist.broadcast(tensor, source, group=mesh.pp_group)
        return tensors

    def _shard_group(self, row: Row) -> ProcessGroup:
        """The ranks that share a row's parameter, where its layout cuts it."""
        return self.mesh.tp_group if row.expert is None else self.mesh.etp_group

    def _unshard(self, layout: Layout, shard: Tensor, group: ProcessGroup) -> Tensor:
        if group.size() == 1 or layout.tp_dim is None:
            return shard
        shards = [torch.empty_like(shard) for _ in range(group.size())]
        dist.all_gather(shards, shard.contiguous(), group=group)
        return layout.unshard(shards)

    # ---- forward -----------------------------------------------------------------------------

    def run_schedule(
        self, micro_batches: Sequence[MicroBatch], on_logits: Any, *, forward_only: bool
    ) -> list[Any]:
        """Run Megatron's schedule (1F1B where there are stages) over micro-batches.

        Args:
            micro_batches: at least one; equal on all ranks of one model replica.
            on_logits: called on the last stage with (logits, micro_batch), the logits of this
                context-parallel rank's tokens; see Megatron's loss function for what it returns;
                anything when forward_only.
            forward_only: no backward pass.

        Returns:
            What `on_logits` reported for each micro-batch on the last stage; [] elsewhere.
        """

        def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> Any:
            batch = next(iterator).to(self.platform.device)
            tokens, positions = (self._own(x) for x in (batch.tokens, batch.position_ids))
            output = model(tokens, positions, None)
            return output, lambda logits, **_: on_logits(logits, batch)

        first = micro_batches[0].tokens
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[self.module],
            num_microbatches=len(micro_batches),
            seq_length=first.shape[1],
            micro_batch_size=first.shape[0],
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _own(self, x: Tensor) -> Tensor:
        """This rank's columns of [b, S], after padding that all ranks can share."""
        multiple = 2 * self.mesh.cp_size if self.mesh.cp_size > 1 else 1
        if self.config.sequence_parallel:
            multiple *= self.mesh.tp_size
        return own_tokens(F.pad(x, (0, -x.shape[1] % multiple)), self.mesh.cp_group)

    def token_logprobs(
        self, logits: Tensor, batch: MicroBatch, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(logprobs, entropy) of the labels of a micro-batch, float32 [b, S]."""
        values = logprobs_and_entropy(
            logits,
            self._own(batch.labels),
            temperature=temperature,
            vocab_size=self.arch.vocab_size,
            group=self.mesh.tp_group,
        )
        columns = batch.labels.shape[1]
        logprobs, entropy = (gather_rows(x, self.mesh.cp_group)[:, :columns] for x in values)
        return logprobs, entropy

    @torch.no_grad()
    def logprobs(
        self, micro_batches: Sequence[MicroBatch], temperature: float
    ) -> list[Tensor | None]:
        """Log-probs of the labels, float32 [b, S] per micro-batch; None off the last stage."""
        was_training = self.module.training
        self.module.eval()
        results = self.run_schedule(
            micro_batches,
            lambda logits, batch: self.token_logprobs(logits, batch, temperature)[0],
            forward_only=True,
        )
        self.module.train(was_training)
        return results or [None] * len(micro_batches)
