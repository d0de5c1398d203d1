"""The rows of a decode that are not done: forwards are made of these alone.

The decode itself goes on with all rows. What it gives to the model is narrowed here, and what comes
back is widened again; a row that has left does not come back.

Shapes: `B` rows of the decode, `R` rows that remain.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from memdlm.backbones.batch_rows import only_rows
from memdlm.backbones.operation_order import free_order

T = TypeVar("T")


class RemainingRows:
    """Which rows remain; all of them at first."""

    def __init__(self) -> None:
        """Begin with all rows."""
        self._rows: list[int] | None = None
        self._index: Tensor | None = None

    def leave(self, is_done: Sequence[bool], device: torch.device) -> Tensor | None:
        """Let rows leave that are done.

        Args:
            is_done: Of all B rows; at least one is not.
            device: Where the decode runs.

        Returns:
            The places [R] int64 of those that remain among those that did before; None if none
            has left.
        """
        before = list(range(len(is_done))) if self._rows is None else self._rows
        places = [place for place, row in enumerate(before) if not is_done[row]]
        if len(places) == len(before):
            return None
        self._rows = [before[place] for place in places]
        self._index = torch.tensor(self._rows, device=device)
        return torch.tensor(places, device=device)

    def take(self, values: Tensor) -> Tensor:
        """Return the rows [R, ...] of `values` [B, ...]."""
        return values if self._index is None else values[self._index]

    def choose(self, values: Sequence[T]) -> list[T]:
        """Return the values of the rows that remain, of those of all B."""
        return list(values) if self._rows is None else [values[row] for row in self._rows]

    def spread(self, values: Tensor, num_rows: int) -> Tensor:
        """Return [B, ...] with `values` [R, ...] in their rows and zeros elsewhere."""
        if self._index is None:
            return values
        whole = values.new_zeros((num_rows, *values.shape[1:]))
        return whole.index_copy_(0, self._index, values)

    @contextmanager
    def in_forward(self) -> Iterator[None]:
        """Tell the forwards within which rows they have, and that they may reorder sums."""
        with only_rows(self._index), free_order():
            yield
