"""Early layers on some positions of every row, beside keys and values that another forward had.

They attend to their own keys and to those that a `KeyRecorder` kept of an ordinary forward. Knows
neither prompts nor memories. Shapes: B batch, L length, Q columns of the row with most, G key-value
heads, D head width, H hidden width.
"""

from dataclasses import dataclass, replace

import torch

from memdlm.backbones.base import DiffusionModel
from memdlm.backbones.kv_cache import Recorded
from memdlm.backbones.layer_inputs import LayerInputs, narrow_inputs


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
    model: DiffusionModel,
    input_ids: torch.Tensor,
    inputs: LayerInputs,
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
