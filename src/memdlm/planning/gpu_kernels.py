"""Where a GPU computes the same with other tensors than the CPU, whose kernels a simulation runs.

Dropout on the CPU keeps a mask in the type of its input; CUDA's kernel keeps one byte per value.
For a LoRA on every linear layer that is gibibytes. Optimizers of torch that are not fused handle
all tensors at once on CUDA, and one by one on the CPU.
"""

import torch
from torch import nn


class GpuDropout(nn.Dropout):
    """`nn.Dropout` that keeps what CUDA's fused kernel keeps."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Drop values of `input`, of any shape."""
        if not self.training or not 0 < self.p < 1 or self.inplace:
            return super().forward(input)
        return torch.native_dropout(input, self.p, True)[0]


def use_gpu_dropout(model: nn.Module) -> None:
    """Turn every dropout layer of `model` into one of a GPU."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = GpuDropout


def handle_all_at_once(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer that leaves the choice to torch choose as on CUDA."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
