"""Feed-forward with a gate (SwiGLU, arXiv 2002.05202), as all dense layers have it."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

from memdlm.backbones.fresh import multiply_fresh


class GatedMLP(nn.Module):
    """down(act(gate x) * up x), without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int, act: str) -> None:
        """Build the projections; `act` is the name transformers has for the activation."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [..., H] for `hidden` [..., H]."""
        inner = gated(self.act_fn, self.gate_proj(hidden), self.up_proj(hidden))
        output: torch.Tensor = self.down_proj(inner)
        return output


def gated(
    act: Callable[[torch.Tensor], torch.Tensor], gates: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Return `act(gates) * values`; all [..., I]."""
    active = act(gates)
    if active is gates or getattr(act, "_forward_hooks", None):  # then it is somebody else's too
        return active * values
    return multiply_fresh(active, values)
