"""Early layers on some positions of every row, beside keys and values that another forward had.

    KeyRecorder      keeps what the early layers of an ordinary forward attend to
    partial_prefix   runs them on chosen columns, which attend to their own keys and those kept

Knows neither prompts nor memories. Shapes: B batch, L length, Q columns of the row with most, G
key-value heads, D head width, H hidden width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from memdlm.backbones.narrow_attention import narrow_inputs

if TYPE_CHECKING:
    from memdlm.backbones.base import DiffusionModel, LayerInputs

Recorded = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [B, G, L, D] by layer, without gradient."""


@dataclass(frozen=True)
class RowColumns:
    """Chosen columns of every row, filled up to the row with most.

    Attributes:
        positions: Their places [B, Q] int64; a place repeats the row's last one, or is 0.
        slots: Where results go [B, Q] int64: the same, but L, which nobody reads, for repetitions.
    """

    positions: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def pack(cls, chosen: torch.Tensor) -> "RowColumns":
        """Pack the true columns of `chosen` [B, L] bool, on the CPU: Q is counted there."""
        counts = chosen.sum(dim=1, keepdim=True)
        width = max(1, int(counts.max()))
        order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        places = torch.arange(width).expand(len(chosen), -1)
        positions = order.gather(1, torch.minimum(places, (counts - 1).clamp(min=0)))
        return cls(positions, positions.masked_fill(places >= counts, chosen.shape[1]))

    def to(self, device: torch.device) -> "RowColumns":
        """Return a copy on `device`, without waiting for it."""
        return RowColumns(
            self.positions.to(device, non_blocking=True), self.slots.to(device, non_blocking=True)
        )

    def put(self, part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Return `whole` [B, ..., L, D] with `part` [B, ..., Q, D] at these columns."""
        index = self.slots.view(len(self.slots), *(1,) * (part.dim() - 3), -1, 1).expand_as(part)
        # One slot more than the row is long, for the repetitions.
        longer = torch.cat([whole, whole[..., :1, :]], dim=-2)
        return longer.scatter_(-2, index, part.to(whole.dtype))[..., :-1, :]


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


@dataclass(frozen=True)
class _BesideRecorded:
    """A cache to the layers: fresh keys and values in the place of the recorded ones."""

    recorded: Recorded
    columns: RowColumns

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.recorded[layer_idx]
        return self.columns.put(key, keys), self.columns.put(value, values)


def partial_prefix(
    model: "DiffusionModel",
    input_ids: torch.Tensor,
    inputs: "LayerInputs",
    stop: int,
    columns: RowColumns,
    recorded: Recorded,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Return hidden states [B, L, H] before layer `stop`, computed at `columns` only.

    What `model.prefix` returns, if the states elsewhere do not depend on the tokens at `columns`
    and are those of the recorded forward; an approximation of it otherwise.

    Args:
        model: The layers.
        input_ids: Token ids [B, L] int64; those elsewhere are not looked at.
        inputs: As for all L columns.
        stop: The first layer not to run.
        columns: Where to run.
        recorded: Of a forward through these layers.
        hidden: Hidden states [B, L, H] that it had before layer `stop`.
    """
    narrowed = narrow_inputs(inputs, columns.positions)
    inputs = replace(narrowed, cache=_BesideRecorded(recorded, columns))
    own = model.embed_tokens(input_ids.gather(1, columns.positions))
    return columns.put(model.run_layers(own, inputs, 0, stop), hidden)
