"""What an inner loss may look at, and what it returns.

Shapes: N supervised positions, H width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from memdlm.memory.config import MemoryConfig


@dataclass(frozen=True)
class Prediction:
    """The model's view of the supervised positions.

    Attributes:
        hidden: Last hidden states before the final norm [N, H].
        normed: After the final norm [N, H].
        head: Maps `normed` to logits [N, V]; called only by losses that need them.
    """

    hidden: torch.Tensor
    normed: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]

    def part(self, span: slice) -> "Prediction":
        """Return the view of some of the positions, without gradient."""
        return Prediction(self.hidden[span].detach(), self.normed[span].detach(), self.head)

    def logits(self) -> torch.Tensor:
        """Return logits [N, V] in float32."""
        return self.head(self.normed).float()


@dataclass(frozen=True)
class InnerLoss:
    """A per-token loss between the student and clean labels or a teacher.

    Attributes:
        compute: Called with student, teacher (None unless `needs_teacher`), clean labels [N] and
            the memory's settings; returns the loss of every token [N] float32.
        needs_teacher: Whether the less noisy next state has to be run too.
        needs_logits: Whether it looks at logits, which exist for a few tokens at a time: `compute`
            then sees a part of the tokens, and their `hidden` without gradient.
    """

    compute: Callable[[Prediction, Prediction | None, torch.Tensor, MemoryConfig], torch.Tensor]
    needs_teacher: bool
    needs_logits: bool
