"""From rows of tokens to micro-batches, and per-token values there and back.

micro_batching.py says which rows share a micro-batch; here they become tensors. `row_ids` remembers
which row went where. A micro-batch always has its rows side by side, padded on the right: whether a
model computes the padding is the model's affair (see policy/token_layout.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from gdpo_megatron.data.micro_batching import MicroBatching

TokenRow = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt (at least one) and of its completion (may be empty)."""

LossMask = Sequence[bool]
"""For each token of a completion, whether it counts; an environment's do not."""

FILLER_ROW_ID = -1
"""In `MicroBatch.row_ids`: stands for no row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows of one forward and backward pass, right-padded; causal attention needs no mask for that.

    Position t sees tokens[t] and predicts labels[t], the row's next token. A row of n tokens takes
    n - 1 positions.

    Args:
        tokens: [b, S] int64.
        labels: [b, S] int64; padding holds a valid token id too.
        position_ids: [b, S] int64, 0 to S - 1.
        loss_mask: [b, S] bool; true where the label is a completion token that the model drew, its
            end token included. It comes from lengths and loss masks, never from token values.
        lengths: [b] int64, positions that a row takes, at least 1; the rest is padding.
        row_ids: [b] int64, index into the rows it was made from; -1 marks filler without loss.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    loss_mask: Tensor
    lengths: Tensor
    row_ids: Tensor

    def __post_init__(self) -> None:
        shape = self.tokens.shape
        for name in ("tokens", "labels", "position_ids", "loss_mask"):
            tensor = getattr(self, name)
            dtype = torch.bool if name == "loss_mask" else torch.int64
            if tensor.ndim != 2 or tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"MicroBatch.{name} must be {dtype} {tuple(shape)}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
        for name in ("lengths", "row_ids"):
            tensor = getattr(self, name)
            if tensor.shape != shape[:1] or tensor.dtype != torch.int64:
                raise ValueError(
                    f"MicroBatch.{name} must be torch.int64 {tuple(shape[:1])}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )

    @property
    def num_loss_tokens(self) -> int:
        """Completion tokens in this micro-batch."""
        return int(self.loss_mask.sum())

    @property
    def num_positions(self) -> int:
        """Positions that its rows take; filler takes none."""
        return int(self.lengths[self.row_ids != FILLER_ROW_ID].sum())

    def to(self, device: torch.device | str) -> Self:
        """Return it with all tensors on `device`, optional ones of subclasses included."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: tensor if tensor is None else tensor.to(device)
            for name, tensor in tensors.items()
        }
        return type(self)(**moved)


def make_micro_batches(
    rows: Sequence[TokenRow],
    batching: MicroBatching,
    *,
    loss_masks: Sequence[LossMask] | None = None,
    peers: Sequence[Sequence[int]] = (),
    pad_token_id: int = 0,
) -> list[MicroBatch]:
    """Cut the rows of a data-parallel rank into micro-batches; at least one.

    Filler without loss stands where there is no row: on a rank that has none, and where ranks that
    share experts have to run equally many.

    Args:
        rows: prompts and completions.
        batching: which rows share a micro-batch.
        loss_masks: for each row; not given, all completion tokens count.
        peers: tokens of each row, of each data-parallel rank; only where `batching.same_number`.
        pad_token_id: any valid token id.

    Raises:
        ValueError: a prompt is empty, so nothing predicts its completion's first token; or a loss
            mask is not as long as its completion.
    """
    masks = [[True] * len(row[1]) for row in rows] if loss_masks is None else loss_masks
    for row_id, ((prompt_ids, completion_ids), mask) in enumerate(zip(rows, masks, strict=True)):
        if not len(prompt_ids):
            raise ValueError(f"row {row_id}: the prompt has no tokens")
        if len(mask) != len(completion_ids):
            what = f"a loss mask of {len(mask)} for {len(completion_ids)} completion tokens"
            raise ValueError(f"row {row_id}: {what}")
    assert peers or not batching.same_number, "the number of micro-batches of other ranks is needed"
    lengths = [len(prompt_ids) + len(completion_ids) for prompt_ids, completion_ids in rows]
    groups, multiple = batching.groups(lengths), batching.pad_to_multiple_of
    together = sorted(row_id for group in groups for row_id in group)
    assert together == list(range(len(rows))), "every row belongs to one micro-batch"
    micro_batches = [_pad(rows, masks, group, multiple, pad_token_id) for group in groups]
    while len(micro_batches) < batching.num_micro_batches(lengths, peers):
        filler = _pad([([pad_token_id], [])], [[]], [0], multiple, pad_token_id)
        filler.row_ids.fill_(FILLER_ROW_ID)
        micro_batches.append(filler)
    return micro_batches


def _pad(
    rows: Sequence[TokenRow],
    masks: Sequence[LossMask],
    row_ids: Sequence[int],
    pad_to_multiple_of: int,
    pad_token_id: int,
) -> MicroBatch:
    lengths = [max(1, len(rows[i][0]) + len(rows[i][1]) - 1) for i in row_ids]
    width = -(-max(lengths) // pad_to_multiple_of) * pad_to_multiple_of
    shape = (len(row_ids), width)
    tokens = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, pad_token_id, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for slot, row_id in enumerate(row_ids):
        prompt_ids, completion_ids = rows[row_id]
        sequence = torch.tensor([*prompt_ids, *completion_ids], dtype=torch.int64)
        end = len(sequence) - 1
        tokens[slot, :end] = sequence[:-1]
        labels[slot, :end] = sequence[1:]
        loss_mask[slot, len(prompt_ids) - 1 : end] = torch.tensor(masks[row_id], dtype=torch.bool)
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        position_ids=torch.arange(width).repeat(len(row_ids), 1),
        loss_mask=loss_mask,
        lengths=torch.tensor(lengths, dtype=torch.int64),
        row_ids=torch.tensor(row_ids, dtype=torch.int64),
    )


def select_row_values(values: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Return the per-row values of a micro-batch, such as advantages; 0 for filler.

    Args:
        values: [num_rows, ...], in the order of the rows that the micro-batch was made from.
        micro_batch: b rows.

    Returns:
        [b, ...].
    """
    row_ids = micro_batch.row_ids
    if values.shape[0] == 0:
        return values.new_zeros((len(row_ids), *values.shape[1:]))
    selected = values[row_ids.clamp(min=0)]
    selected[row_ids == FILLER_ROW_ID] = 0
    return selected


def place_token_values(
    values: Sequence[Sequence[float]], micro_batch: MicroBatch, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Lay values per completion token, such as rollout_logprobs, under the labels they belong to.

    Args:
        values: for each row, one value per completion token that counts.
        micro_batch: b rows of S positions.
        dtype: of the result.

    Returns:
        [b, S]; 0 where loss_mask is false.

    Raises:
        ValueError: a row has not one value per such token.
    """
    placed = torch.zeros(micro_batch.tokens.shape, dtype=dtype)
    for slot, row_id in enumerate(micro_batch.row_ids.tolist()):
        if row_id == FILLER_ROW_ID:
            continue
        positions = micro_batch.loss_mask[slot]
        if len(values[row_id]) != int(positions.sum()):
            raise ValueError(
                f"row {row_id}: {len(values[row_id])} values for "
                f"{int(positions.sum())} completion tokens"
            )
        placed[slot, positions] = torch.as_tensor(values[row_id], dtype=dtype)
    return placed


def collect_token_values(
    values: Sequence[Tensor], micro_batches: Sequence[MicroBatch], num_rows: int
) -> list[Tensor]:
    """Bring results per label back to the rows: the inverse of `place_token_values`.

    Args:
        values: a [b, S] tensor for each micro-batch.
        micro_batches: those of `make_micro_batches`, together all rows.
        num_rows: how many rows they were made from.

    Returns:
        For each row, [T] values of its completion tokens that count.

    Raises:
        ValueError: a row is in no micro-batch, or in two.
    """
    collected: list[Tensor | None] = [None] * num_rows
    for tensor, micro_batch in zip(values, micro_batches, strict=True):
        for slot, row_id in enumerate(micro_batch.row_ids.tolist()):
            if row_id == FILLER_ROW_ID:
                continue
            if collected[row_id] is not None:
                raise ValueError(f"row {row_id} is in two micro-batches")
            collected[row_id] = tensor[slot, micro_batch.loss_mask[slot]]
    missing = [row_id for row_id, row_values in enumerate(collected) if row_values is None]
    if missing:
        raise ValueError(f"rows {missing[:5]} are in no micro-batch")
    return [row_values for row_values in collected if row_values is not None]
