"""From rows of tokens to balanced, padded micro-batches, and per-token values there and back.

Rows (prompt and completion) are first assigned to the data-parallel ranks so that all have about
the same work, then each rank sorts its rows by length, so that padding is small, and cuts them into
micro-batches. `row_ids` remembers which row went where. Nothing here communicates: every rank
computes the same assignment from the same lengths.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

TokenRow = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt (at least one) and of its completion (may be empty)."""

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
        loss_mask: [b, S] bool; true where the label is a completion token, its end token included.
            It comes from lengths, never from token values.
        row_ids: [b] int64, index into the rows it was made from; -1 marks filler without loss.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    loss_mask: Tensor
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
        if self.row_ids.shape != shape[:1] or self.row_ids.dtype != torch.int64:
            raise ValueError(
                f"MicroBatch.row_ids must be torch.int64 {tuple(shape[:1])}, "
                f"got {self.row_ids.dtype} {tuple(self.row_ids.shape)}"
            )

    @property
    def num_loss_tokens(self) -> int:
        """Completion tokens in this micro-batch."""
        return int(self.loss_mask.sum())

    def to(self, device: torch.device | str) -> Self:
        """Return it with all tensors on `device`, optional ones of subclasses included."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: tensor if tensor is None else tensor.to(device)
            for name, tensor in tensors.items()
        }
        return type(self)(**moved)


def sequence_cost(length: int, hidden_size: int) -> float:
    """Relative cost of one sequence through a transformer layer.

    The matrix products of a layer take about 24 h^2 operations a token, causal attention about
    2 h L: so L (1 + L / 12 h), in units of a token without attention.
    """
    return length * (1.0 + length / (12.0 * hidden_size))


def assign_rows(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Assign rows to data-parallel ranks so that the largest sum of costs is small.

    Greedy, costliest row first to the least loaded rank, which is within 4/3 of the optimum
    (Graham 1969). Ties go to the lower row and the lower rank, so all ranks agree.

    Args:
        costs: one per row, not negative.
        num_ranks: data-parallel ranks.

    Returns:
        Row indices of each rank, ascending. Sizes differ; a rank is empty when rows are few.
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        load, rank = loads[0]
        ranks[rank].append(row)
        heapq.heapreplace(loads, (load + costs[row], rank))
    return [sorted(rows) for rows in ranks]


def make_micro_batches(
    rows: Sequence[TokenRow],
    *,
    micro_batch_size: int,
    pad_to_multiple_of: int = 1,
    pad_token_id: int = 0,
    min_micro_batches: int = 0,
) -> list[MicroBatch]:
    """Cut rows into padded micro-batches, longest rows first.

    The longest come first because memory then peaks in the first micro-batch: a run that does not
    fit fails at once.

    Args:
        rows: prompts and completions.
        micro_batch_size: rows of a micro-batch; the last one may have fewer.
        pad_to_multiple_of: S becomes a multiple of this (tensor or context parallel size).
        pad_token_id: any valid token id.
        min_micro_batches: filler without loss is added up to this number, for ranks that have no
            rows but must take part in the collectives.

    Raises:
        ValueError: a prompt is empty, so nothing predicts its completion's first token.
    """
    for row_id, (prompt_ids, _) in enumerate(rows):
        if not len(prompt_ids):
            raise ValueError(f"row {row_id}: the prompt has no tokens")
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]) - len(rows[i][1]), i))
    micro_batches = [
        _pad(rows, order[start : start + micro_batch_size], pad_to_multiple_of, pad_token_id)
        for start in range(0, len(order), micro_batch_size)
    ]
    while len(micro_batches) < min_micro_batches:
        filler: TokenRow = ([pad_token_id], [])
        micro_batch = _pad([filler], [0], pad_to_multiple_of, pad_token_id)
        micro_batch.row_ids.fill_(FILLER_ROW_ID)
        micro_batches.append(micro_batch)
    return micro_batches


def _pad(
    rows: Sequence[TokenRow], row_ids: Sequence[int], pad_to_multiple_of: int, pad_token_id: int
) -> MicroBatch:
    num_positions = max(len(rows[i][0]) + len(rows[i][1]) - 1 for i in row_ids)
    length = max(1, -(-num_positions // pad_to_multiple_of)) * pad_to_multiple_of
    shape = (len(row_ids), length)
    tokens = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, pad_token_id, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for slot, row_id in enumerate(row_ids):
        prompt_ids, completion_ids = rows[row_id]
        sequence = torch.tensor([*prompt_ids, *completion_ids], dtype=torch.int64)
        end = len(sequence) - 1
        tokens[slot, :end] = sequence[:-1]
        labels[slot, :end] = sequence[1:]
        loss_mask[slot, len(prompt_ids) - 1 : end] = True
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        position_ids=torch.arange(length).repeat(len(row_ids), 1),
        loss_mask=loss_mask,
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
        values: for each row, one value per completion token.
        micro_batch: b rows of S positions.
        dtype: of the result.

    Returns:
        [b, S]; 0 where loss_mask is false.

    Raises:
        ValueError: a row has not one value per completion token.
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
        For each row, [T] values of its completion tokens.

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
