"""Evaluation mode for the time of a decode, safe when several threads decode on one model."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

_lock = Lock()
# Model -> how many decodes run on it, and the submodules that were training before the first.
_running: "WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]]" = WeakKeyDictionary()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; the last to leave gives every submodule back the mode it had.

    A decode that ends while another runs must not put the other's model back into training mode,
    so decodes on one model are counted.
    """
    with _lock:
        count, was_training = _running.get(model, (0, []))
        if count == 0:
            was_training = [module for module in model.modules() if module.training]
            model.eval()
        _running[model] = (count + 1, was_training)
    try:
        yield
    finally:
        with _lock:
            count, was_training = _running.pop(model)
            if count > 1:
                _running[model] = (count - 1, was_training)
            else:
                for module in was_training:
                    module.training = True
