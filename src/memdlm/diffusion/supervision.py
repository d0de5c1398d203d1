"""Which positions of a batch are computed and scored, packed for the device.

Shapes: B batch, L length, P the most supervised positions in any row, N all supervised positions.
The last layer runs at [B, P] (rows stay rows, so per-sequence memories still apply), the head and
the loss at the N real ones. P and N are plain Python numbers: no device has to be asked for them.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Supervision:
    """Supervised positions of one state, with labels and loss coefficients.

    Attributes:
        positions: Position in the row [B, P] int64; rows with fewer are filled with position 0.
        valid: Index into the flattened [B * P] of the real ones [N] int64.
        rows: Row of each real one [N] int64.
        labels: Clean token there [N] int64.
        coefficients: Factor of its loss [N] float32 (see `memdlm.diffusion.objective`).
    """

    positions: torch.Tensor
    valid: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    coefficients: torch.Tensor

    @classmethod
    def pack(
        cls, supervised: torch.Tensor, clean: torch.Tensor, coefficients: torch.Tensor
    ) -> "Supervision":
        """Pack the true positions of `supervised`, all arguments [B, L] on the CPU."""
        counts = supervised.sum(dim=1)
        width = max(1, int(counts.max()))
        # Stable sort brings the supervised positions to the front in their order.
        order = supervised.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        real = torch.arange(width)[None, :] < counts[:, None]  # [B, P]
        positions = order.masked_fill(~real, 0)
        valid = real.flatten().nonzero()[:, 0]
        return cls(
            positions=positions,
            valid=valid,
            rows=valid // width,
            labels=clean.gather(1, positions).flatten()[valid],
            coefficients=coefficients.gather(1, positions).flatten()[valid],
        )

    def to(self, device: torch.device) -> "Supervision":
        """Return a copy on `device`, without waiting for it."""
        return Supervision(
            *(
                value.to(device, non_blocking=True)
                for value in (
                    self.positions,
                    self.valid,
                    self.rows,
                    self.labels,
                    self.coefficients,
                )
            )
        )

    def select(self, at_positions: torch.Tensor) -> torch.Tensor:
        """Return the N real entries of a tensor [B, P, ...] as [N, ...]."""
        return at_positions.flatten(0, 1).index_select(0, self.valid)
