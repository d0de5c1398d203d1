"""Which rows of a batch a forward has, for what is attached to the model row by row.

A decode leaves out rows that are done. A memory per row, attached for the whole batch, then has to
know whose tokens it sees. Kept per thread and task, so that decodes in several threads do not
disturb each other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_PRESENT: ContextVar[torch.Tensor | None] = ContextVar("rows present", default=None)


def present_rows() -> torch.Tensor | None:
    """Return the rows [b] int64 of the batch that the current forward has; None for all."""
    return _PRESENT.get()


@contextmanager
def only_rows(rows: torch.Tensor | None) -> Iterator[None]:
    """Say within the block that forwards have the rows [b] int64 of their batch; None: all."""
    token = _PRESENT.set(rows)
    try:
        yield
    finally:
        _PRESENT.reset(token)
