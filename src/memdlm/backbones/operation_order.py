"""In which order forwards add and multiply: the official code's, or one that reads memory less.

Numbers that are compared with published ones, losses and gradients above all, keep the official
order. A decode compares the logits of a forward among each other, and takes the other one: some
operations then have fewer passes over memory, and their sums are rounded differently.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_is_free: ContextVar[bool] = ContextVar("memdlm_free_order", default=False)


@contextmanager
def free_order() -> Iterator[None]:
    """Let the forwards within, those without gradients, use the order that is fastest."""
    with _order(True):
        yield


@contextmanager
def official_order() -> Iterator[None]:
    """Let the forwards within use the official order, whatever is around."""
    with _order(False):
        yield


def is_order_free() -> bool:
    """Return whether the operations of this forward may be reordered."""
    return _is_free.get() and not torch.is_grad_enabled()


@contextmanager
def _order(is_free: bool) -> Iterator[None]:
    token = _is_free.set(is_free)
    try:
        yield
    finally:
        _is_free.reset(token)
