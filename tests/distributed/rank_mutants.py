"""Errors that a comparison of layouts must see, as context managers by name.

Each is a mistake that runs without complaint: wrong denominators, reductions, attributes, rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

from gdpo_megatron.certify.layout_models import make_rollouts
from gdpo_megatron.conversion import mapping
from gdpo_megatron.policy import context_parallel, head, layer_spec, megatron_policy, weights
from gdpo_megatron.policy.layer_spec import SDPACoreAttention
from gdpo_megatron.policy.megatron_policy import MegatronPolicy
from gdpo_megatron.policy.model import MegatronModel
from gdpo_megatron.policy.token_layout import PackedRows
from gdpo_megatron.update import PolicyLoss


@contextmanager
def _after(cls: type, method: str, action: Callable[[Any], None]) -> Iterator[None]:
    """Call `action(self)` whenever `method` of `cls` has run."""
    original = getattr(cls, method)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = original(self, *args, **kwargs)
        action(self)
        return outcome

    with mock.patch.object(cls, method, wrapped):
        yield


@contextmanager
def denominator_of_rank() -> Iterator[None]:
    """Each data-parallel rank divides by its own tokens."""
    from megatron.core import parallel_state

    lengths = make_rollouts().lengths
    original = PolicyLoss.__init__

    def init(self: PolicyLoss, config: Any, plan: Any, *rest: Any) -> None:
        own = plan.samples[parallel_state.get_data_parallel_rank()]
        original(self, config, replace(plan, num_loss_tokens=sum(lengths[s] for s in own)), *rest)

    with mock.patch.object(PolicyLoss, "__init__", init):
        yield


def mean_over_ranks() -> AbstractContextManager[None]:
    """Gradients are averaged over data-parallel ranks, though the loss is divided already."""

    def scale(policy: MegatronPolicy) -> None:
        for group in policy.ddp[0].bucket_groups:
            for bucket in group.buckets:
                bucket.gradient_scaling_factor = 1.0 / policy.mesh.dp_size

    return _after(MegatronPolicy, "__init__", scale)


def no_reduction_over_ranks() -> AbstractContextManager[None]:
    """Gradients stay on their data-parallel rank."""

    def cut(policy: MegatronPolicy) -> None:
        policy.ddp[0].finish_grad_sync = lambda *args, **kwargs: None

    return _after(MegatronPolicy, "__init__", cut)


@contextmanager
def first_and_last_layer_swapped() -> Iterator[None]:
    """Stages hold each other's layers, at import and export alike."""

    def rows(arch: Any) -> list[mapping.Row]:
        right = mapping.mapping_rows(arch)
        by_layer = {(row.layer, row.megatron): row for row in right}
        other = {0: arch.num_layers - 1, arch.num_layers - 1: 0}
        return [
            replace(row, hf=by_layer[other.get(row.layer, row.layer), row.megatron].hf)
            for row in right
        ]

    with mock.patch.object(weights, "mapping_rows", rows):
        yield


def no_tensor_parallel_attributes() -> AbstractContextManager[None]:
    """Shards count as copies, so the gradient norm leaves out all but the first rank's."""

    def clear(built: MegatronModel) -> None:
        for parameter in built.gpt.parameters():
            parameter.tensor_model_parallel = False

    return _after(MegatronModel, "__init__", clear)


def norms_of_own_tokens() -> AbstractContextManager[None]:
    """Under sequence parallelism each rank's norms learn from that rank's tokens alone."""

    def clear(policy: MegatronPolicy) -> None:
        for parameter in policy.gpt.parameters():
            parameter.sequence_parallel = False

    return _after(MegatronPolicy, "__init__", clear)


def keys_of_one_rank() -> AbstractContextManager[None]:
    """Keys and values get the gradient of one context-parallel rank's queries alone."""
    return mock.patch.object(
        layer_spec, "gather_keys", lambda x, group: context_parallel._gather(x, group, False)
    )


@contextmanager
def chunks_swapped() -> Iterator[None]:
    """A rank's two virtual stages hold each other's layers, at import and export alike."""
    original = MegatronModel._rows_of

    def other(self: MegatronModel, chunk: int) -> Iterator[Any]:
        pairs, theirs = list(original(self, chunk)), list(original(self, 1 - chunk))
        here, there = (
            sorted({row.layer for row, _ in rows if row.layer is not None})
            for rows in (pairs, theirs)
        )
        swapped = dict(zip(here, there, strict=False))
        rows = {(row.layer, row.megatron): row for row, _ in [*pairs, *theirs]}
        for row, parameter in pairs:
            yield rows[swapped.get(row.layer, row.layer), row.megatron], parameter

    with mock.patch.object(MegatronModel, "_rows_of", other):
        yield


def embedding_copies_apart() -> AbstractContextManager[None]:
    """The two copies of a tied embedding on the first and last stage learn separately."""
    # The package hides the module behind the function of the same name.
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    return mock.patch.object(finalize, "_allreduce_word_embedding_grads", lambda *args: None)


def padding_in_softmax() -> AbstractContextManager[None]:
    """The padded vocabulary's columns get a part of the probability."""
    original = head.logprobs_and_entropy

    def padded(logits: Any, targets: Any, *, vocab_size: int, **rest: Any) -> Any:
        return original(logits, targets, vocab_size=192, **rest)

    return mock.patch.object(head, "logprobs_and_entropy", padded)


def every_rank_speaks() -> AbstractContextManager[None]:
    """Statistics are added over TP ranks, which all have the same."""
    return mock.patch.object(
        megatron_policy.MegatronPolicy,
        "_reduce_stats",
        _reduce_over_all(megatron_policy.MegatronPolicy._reduce_stats),
    )


def _reduce_over_all(original: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    def reduce(self: MegatronPolicy, reported: Any, loss_fn: Any) -> dict[str, float]:
        mesh = self.mesh
        self.mesh = replace(mesh, tp_rank=0)
        try:
            return original(self, reported, loss_fn)
        finally:
            self.mesh = mesh

    return reduce


@contextmanager
def attention_across_rows() -> Iterator[None]:
    """Tokens of a pack see the rows before theirs."""
    original = SDPACoreAttention.forward

    def forward(self: Any, query: Any, *args: Any, packed_seq_params: Any, **kwargs: Any) -> Any:
        if packed_seq_params is not None:
            whole = _whole(packed_seq_params, query.shape[0])
            packed_seq_params = replace(packed_seq_params, cu_seqlens_q=whole)
        return original(self, query, *args, packed_seq_params=packed_seq_params, **kwargs)

    with mock.patch.object(SDPACoreAttention, "forward", forward):
        yield


def keys_positions_go_on() -> AbstractContextManager[None]:
    """Rotary positions start anew in each row of a pack for queries, not for keys."""
    return _packed(
        lambda params, total: replace(
            params, cu_seqlens_kv=_whole(params, total), max_seqlen_kv=total + 1
        )
    )


def all_positions_go_on() -> AbstractContextManager[None]:
    """They start anew for neither."""
    return _packed(lambda params, total: replace(params, max_seqlen_q=total, max_seqlen_kv=total))


def _whole(params: Any, total: int) -> Any:
    return params.cu_seqlens_q.new_tensor([0, total])


@contextmanager
def _packed(change: Callable[[Any, int], Any]) -> Iterator[None]:
    """Change where the model is told that the rows of a pack begin."""
    original = PackedRows.__init__

    def init(self: PackedRows, batch: Any, length: int) -> None:
        original(self, batch, length)
        self.packed_seq_params = change(self.packed_seq_params, length)

    with mock.patch.object(PackedRows, "__init__", init):
        yield


@contextmanager
def last_row_of_a_pack_dropped() -> Iterator[None]:
    """The results of the last row stay where they are."""
    original = PackedRows.rows

    def rows(self: PackedRows, values: Any) -> Any:
        whole = original(self, values).clone()
        whole[-1] = 0
        return whole

    with mock.patch.object(PackedRows, "rows", rows):
        yield


@contextmanager
def row_lost_from_the_budget() -> Iterator[None]:
    """The last row of each micro-batch has no loss."""
    original = PolicyLoss.__call__

    def call(self: PolicyLoss, logprobs: Any, entropy: Any, batch: Any) -> Any:
        kept = batch.loss_mask.clone()
        kept[1:][-1:] = False
        return original(self, logprobs, entropy, replace(batch, loss_mask=kept))

    with mock.patch.object(PolicyLoss, "__call__", call):
        yield


MUTANTS: dict[str | None, Callable[[], AbstractContextManager[Any]]] = {
    None: nullcontext,
    "denominator_of_rank": denominator_of_rank,
    "mean_over_ranks": mean_over_ranks,
    "no_reduction_over_ranks": no_reduction_over_ranks,
    "first_and_last_layer_swapped": first_and_last_layer_swapped,
    "no_tensor_parallel_attributes": no_tensor_parallel_attributes,
    "embedding_copies_apart": embedding_copies_apart,
    "padding_in_softmax": padding_in_softmax,
    "every_rank_speaks": every_rank_speaks,
    "norms_of_own_tokens": norms_of_own_tokens,
    "keys_of_one_rank": keys_of_one_rank,
    "chunks_swapped": chunks_swapped,
    "attention_across_rows": attention_across_rows,
    "keys_positions_go_on": keys_positions_go_on,
    "all_positions_go_on": all_positions_go_on,
    "last_row_of_a_pack_dropped": last_row_of_a_pack_dropped,
    "row_lost_from_the_budget": row_lost_from_the_budget,
}
