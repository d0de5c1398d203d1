"""Chosen columns of every row, as rectangular tensors: rows may choose different numbers of them.

Shapes: B batch, L length, Q columns of the row with most, D width.
"""

from dataclasses import dataclass

import torch


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
