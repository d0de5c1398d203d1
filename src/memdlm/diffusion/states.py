"""What a sequence looks like at one noise level, and the clean batch it came from. Plain data.

Shapes: B batch, L length. Everything lives on the CPU: states are drawn before the step starts, so
that the number of masked tokens is known to the host and the device never has to report it back
(docs/decisions/0001-host-side-trajectories.md).
"""

from dataclasses import dataclass

import torch

from memdlm.errors import DataError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class State:
    """One noisy view x_t of a batch.

    Attributes:
        ids: Token ids [B, L] int64, the mask token where `masked`.
        masked: Which positions are hidden [B, L] bool.
    """

    ids: torch.Tensor
    masked: torch.Tensor


@dataclass(frozen=True)
class CleanBatch:
    """Ground truth x_0 and which of its positions diffusion may touch.

    Attributes:
        clean: Token ids [B, L] int64.
        maskable: Response positions [B, L] bool; the prompt is never masked.
        padding: Positions [B, L] bool that only fill the row up to L.
    """

    clean: torch.Tensor
    maskable: torch.Tensor
    padding: torch.Tensor

    @classmethod
    def from_labels(
        cls, clean: torch.Tensor, labels: torch.Tensor, padding: torch.Tensor | None = None
    ) -> "CleanBatch":
        """Build the batch from Hugging Face style labels (-100 = not supervised), all [B, L].

        Raises:
            DataError: If the shapes differ.
        """
        if clean.shape != labels.shape:
            raise DataError(
                f"input_ids {tuple(clean.shape)} and labels {tuple(labels.shape)} differ in shape; "
                "use memdlm.data.collation.Collator or pad both alike"
            )
        if padding is None:
            padding = torch.zeros_like(labels, dtype=torch.bool)
        return cls(clean, labels != IGNORED_LABEL, padding.bool())

    def without_padding(self) -> "CleanBatch":
        """Return the same batch in which padding can neither be masked nor supervised."""
        return CleanBatch(self.clean, self.maskable & ~self.padding, self.padding)

    def state(self, masked: torch.Tensor, mask_token_id: int) -> State:
        """Return the state in which exactly `masked` [B, L] is hidden."""
        return State(torch.where(masked, mask_token_id, self.clean), masked)

    def clean_state(self) -> State:
        """Return x_0 as a state in which nothing is hidden."""
        return State(self.clean, torch.zeros_like(self.maskable))
