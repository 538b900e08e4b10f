"""The order in which rows of a data set are drawn: a stream of epochs that can be resumed.

Each epoch is a permutation that depends on (seed, epoch) alone, so the whole stream is a function
of its position, and no global random state takes part: the state is that number, and the rows that
were put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gdpo_megatron.errors import InputError


class PromptSampler:
    """Draws row indices, batch after batch.

    Batches cross the border between epochs; no row is dropped or drawn twice in an epoch. A batch
    may be larger than the data set.

    Args:
        num_rows: rows of the data set.
        batch_size: rows of one batch. A resumed run may change it; the stream of rows stays.
        seed: of the permutations.
        shuffle: permute each epoch; otherwise file order.

    Example:
        >>> PromptSampler(num_rows=3, batch_size=4, seed=0, shuffle=False).next_batch()
        [0, 1, 2, 0]
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, shuffle: bool = True):
        if num_rows < 1 or batch_size < 1:
            raise ValueError(f"num_rows {num_rows} and batch_size {batch_size} must be positive")
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._position = 0
        self._put_back: list[int] = []
        self._order = self._permutation(0)

    @property
    def epoch(self) -> int:
        """Epoch of the next row, from 0."""
        return self._position // self.num_rows

    def next_batch(self, size: int | None = None) -> list[int]:
        """Return the next `size` row indices, `batch_size` unless given."""
        size = self.batch_size if size is None else size
        batch, self._put_back = self._put_back[:size], self._put_back[size:]
        while len(batch) < size:
            start = self._position % self.num_rows
            rows = self._order[start : start + size - len(batch)]
            batch += rows
            self._position += len(rows)
            if start + len(rows) == self.num_rows:
                self._order = self._permutation(self.epoch)
        return batch

    def put_back(self, rows: Sequence[int]) -> None:
        """Return rows that were drawn and not used; they are the next ones to be drawn."""
        self._put_back = [*rows, *self._put_back]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, what it is a position in, and the rows that were put back."""
        return {**self._identity(), "position": self._position, "put_back": [*self._put_back]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stream where `state` was taken.

        Raises:
            InputError: the state is that of another data set size, seed or order.
        """
        changed = [
            f"{name} was {state.get(name)}, is {value}"
            for name, value in self._identity().items()
            if state.get(name) != value
        ]
        if changed:
            raise InputError(
                f"cannot resume the data order: {'; '.join(changed)}; restore these settings and "
                "the data file, or start a new run_dir"
            )
        self._position = int(state["position"])
        self._put_back = [*state.get("put_back", [])]
        self._order = self._permutation(self.epoch)

    def _identity(self) -> dict[str, Any]:
        return {"num_rows": self.num_rows, "seed": self.seed, "shuffle": self.shuffle}

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_rows))
        # RandomState, because numpy promises never to change its streams; Generator's may change.
        entropy = np.random.SeedSequence([self.seed % 2**64, epoch])
        return np.random.RandomState(np.random.MT19937(entropy)).permutation(self.num_rows).tolist()
