"""Where a GPU computes the same with other tensors than the CPU, whose kernels a simulation runs.

Dropout on the CPU keeps a mask in the type of its input; CUDA's kernel keeps one byte per value.
For a LoRA on every linear layer that is gibibytes. Optimizers of torch that are not fused handle
all tensors at once on CUDA, and one by one on the CPU.
"""

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class GpuDropout(TorchFunctionMode):
    """Runs dropout in train mode as CUDA's fused kernel does."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.dropout:
            return _dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    if not training or not 0 < p < 1 or inplace:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def handle_all_at_once(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer that leaves the choice to torch choose as on CUDA."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
