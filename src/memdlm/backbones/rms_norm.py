"""Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467), as all families have it."""

import torch
from torch import nn

from memdlm.backbones.fresh import multiply_fresh
from memdlm.backbones.operation_order import is_order_free


class RMSNorm(nn.Module):
    """Scales the last dimension to a root mean square of one, in float32, then by `weight`.

    Rounded as in the official code: the normed states in the dtype they came in, before `weight`
    [H] multiplies them.
    """

    def __init__(self, width: int, eps: float) -> None:
        """Begin with a weight of ones."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the normed `hidden` [..., H]."""
        states = hidden.to(torch.float32)
        normed = states * torch.rsqrt(_mean_square(states) + self.eps)
        return multiply_fresh(normed.to(hidden.dtype), self.weight)

    def extra_repr(self) -> str:
        """Show the width and epsilon."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def _mean_square(states: torch.Tensor) -> torch.Tensor:
    """Return the mean of the squares of `states` [..., H]: [..., 1]."""
    if not is_order_free():
        return states.square().mean(dim=-1, keepdim=True)
    # In one pass: the squares never leave the processor.
    norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return norm.square_().div_(states.shape[-1])
