"""Which tensors are alive, how large they are and what they are for, from first to last operation.

Every storage gets an entry when it first appears and another when it is gone. What it is for may
become known later (a gradient is known as one when its parameter takes it), so labels are kept
apart and the peak is found afterwards.
"""

import weakref
from collections import Counter

import torch

ACTIVATIONS = "activations"


class MemoryLedger:
    """Records storages as they come and go; knows no model and no device.

    The bytes are those of tensors: workspace that a kernel takes and returns within one operation
    is not seen.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._changes: list[tuple[int, int]] = []
        self._keys: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._labels: dict[int, str] = {}

    def hold(self, tensor: torch.Tensor) -> bool:
        """Note that the storage of `tensor` exists; return whether that is news."""
        storage = tensor.untyped_storage()
        address = id(storage)  # one Python object for as long as the storage lives
        if address in self._keys:
            return False
        key, size = len(self._changes), storage.nbytes()
        self._keys[address] = key
        self._changes.append((key, size))
        self._watches[address] = weakref.ref(storage, lambda _: self._release(address, key, size))
        return True

    def label(self, tensor: torch.Tensor, label: str) -> None:
        """Say what the storage of `tensor` is for, in place of what was said before."""
        self.hold(tensor)
        self._labels[self._keys[id(tensor.untyped_storage())]] = label

    def label_of(self, tensor: torch.Tensor) -> str | None:
        """Return what `tensor` has been said to be for."""
        return self._labels.get(self._keys.get(id(tensor.untyped_storage()), -1))

    def peak(self) -> dict[str, int]:
        """Return the bytes of every label when their sum was largest."""
        held: Counter[str] = Counter()
        total = most = 0
        parts: dict[str, int] = {}
        for key, change in self._changes:
            held[self._labels.get(key, ACTIVATIONS)] += change
            total += change
            if total > most:
                most, parts = total, dict(held)
        return parts

    def largest(self) -> dict[str, int]:
        """Return the most bytes of every label, each at a moment of its own."""
        held: Counter[str] = Counter()
        most: Counter[str] = Counter()
        for key, change in self._changes:
            label = self._labels.get(key, ACTIVATIONS)
            held[label] += change
            most[label] = max(most[label], held[label])
        return dict(most)

    def _release(self, address: int, key: int, size: int) -> None:
        del self._keys[address], self._watches[address]
        self._changes.append((key, -size))
