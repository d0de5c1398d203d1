"""Keys and values that outlive a forward, so that the next one runs on a few positions only.

    KVCache       gives queries the keys of earlier forwards, when decoding
    KeyRecorder   keeps those of one forward, and leaves that as it is

A `KVCache` has one slot per position of each row. Every forward says where its tokens belong and
how many slots its queries may look at; what they see among those is the attention mask's business.
Attention knows a cache by one method, `update`.

Knows neither blocks nor decoding. Shapes: B rows, Q query tokens of a forward, S slots, K visible
slots, G key-value heads, D head width.
"""

from collections.abc import Mapping
from typing import Protocol

import torch


class AttentionCache(Protocol):
    """All that an attention module knows of a cache."""

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values to attend to, given a layer's own [B, G, Q, D]."""
        ...


class KVCache:
    """One store per layer, allocated by the first forward in the dtype that its keys have.

    A slot that nothing was written to holds zeros; hide it with the attention mask. One cache
    serves one decode: it is written by every forward and must not be shared between threads.
    """

    def __init__(self, num_slots: int) -> None:
        """Provide `num_slots` slots per row."""
        self.num_slots = num_slots
        self._stores: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._slots: torch.Tensor | None = None
        self._num_visible = 0

    @property
    def num_visible(self) -> int:
        """Slots that the queries of the coming forward may look at, as `open` was told."""
        return self._num_visible

    def open(self, slots: torch.Tensor, num_visible: int) -> None:
        """Prepare for the next forward.

        Args:
            slots: Where its tokens are kept [B, Q] int64; whatever was there is replaced.
            num_visible: Its queries get the slots 0 to this, without: the last dimension of its
                attention mask.
        """
        self._slots, self._num_visible = slots, num_visible

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep a layer's keys and values [B, G, Q, D]; return those of all visible slots.

        Called by the attention of layer `layer_idx`, after the rotary embedding.

        Returns:
            Keys and values [B, G, K, D]: views, overwritten by later forwards.

        Raises:
            ValueError: Before `open`, or if the forward has other rows or tokens than announced.
        """
        if self._slots is None or self._slots.shape != (key.shape[0], key.shape[2]):
            announced = None if self._slots is None else tuple(self._slots.shape)
            raise ValueError(
                f"the cache expects {announced} query tokens but the forward has "
                f"{(key.shape[0], key.shape[2])}; call open(slots, num_visible) before each forward"
            )
        if layer_idx not in self._stores:
            shape = (*key.shape[:2], self.num_slots, key.shape[3])
            self._stores[layer_idx] = (key.new_zeros(shape), value.new_zeros(shape))
        index = self._slots[:, None, :, None].expand_as(key)
        keys, values = self._stores[layer_idx]
        keys.scatter_(2, index, key.to(keys.dtype))
        values.scatter_(2, index, value.to(values.dtype))
        return keys[:, :, : self._num_visible], values[:, :, : self._num_visible]

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all rows but `rows` [b] int64, which the coming forwards have in this order."""
        self._stores = {
            layer: (keys[rows], values[rows]) for layer, (keys, values) in self._stores.items()
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all stores."""
        return sum(t.numel() * t.element_size() for pair in self._stores.values() for t in pair)


Recorded = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [B, G, L, D] by layer, without gradient."""


class KeyRecorder:
    """Keeps each layer's keys and values once, and never changes what attention computes with.

    To a layer it is a cache. Gradient checkpointing runs a layer again during the backward pass;
    by then `take` has been called, and the second run leaves no trace. What is kept is detached
    and shares storage with what attention keeps for its own gradient, so it takes memory only where
    activations are checkpointed: 2 B G L D values per layer, until the caller drops them.
    """

    def __init__(self) -> None:
        """Start recording."""
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the keys and values [B, G, L, D] of layer `layer_idx`; return them as they are."""
        if self._kept is not None:
            self._kept[layer_idx] = (key.detach(), value.detach())
        return key, value

    def take(self) -> Recorded:
        """End recording and hand over what was kept.

        Raises:
            ValueError: If it was taken before.
        """
        if self._kept is None:
            raise ValueError("these keys were taken before; use one recorder per forward")
        kept, self._kept = self._kept, None
        return kept
