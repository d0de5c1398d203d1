"""One user at a time of what a memory does to a shared model: its hooks and its mode.

A memory is attached by hooks, so every forward of the model within the block sees it, whichever
thread runs it. Whoever may be called from several threads therefore holds this lock around its
forwards. Rows with different memories in one batch are the way to serve many at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from weakref import WeakKeyDictionary

from torch import nn

_GUARD = Lock()
_LOCKS: "WeakKeyDictionary[nn.Module, object]" = WeakKeyDictionary()


@contextmanager
def exclusive(backbone: nn.Module) -> Iterator[None]:
    """Wait until no other thread uses `backbone` in such a block; the same thread may nest them."""
    with _GUARD:
        lock = _LOCKS.setdefault(backbone, RLock())
    with lock:  # type: ignore[attr-defined] # the class of an RLock has no public name
        yield
