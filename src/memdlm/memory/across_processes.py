"""One memory for the batches of all processes: the only communication the inner loop ever has.

Every process differentiates its own rows, and the gradients are added up before clipping, so all
processes take the same inner step: the step that one process takes with all rows in one batch and
`sharing: batch`. One memory per sequence, or per process, needs nothing of this.
"""

from collections.abc import Sequence

import torch
from torch import distributed


def shares(counts: torch.Tensor | None, normaliser: str) -> torch.Tensor | None:
    """Return the factor of this process's loss at every inner step [steps]; None if it is alone.

    A loss is normalised by what its own process counts; the factor makes that what all count.

    Args:
        counts: Supervised tokens for the normaliser `token`, rows for the others [steps] float32;
            None where the memory is not shared by processes.
        normaliser: `memory.normaliser`. `reference_sequence` multiplies by the rows where the
            others divide, hence the inverse.
    """
    if counts is None or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    total = counts.clone()
    distributed.all_reduce(total)
    if normaliser == "reference_sequence":
        return total / counts
    return counts / total.clamp(min=1)


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place and in one exchange per type."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    for tensor, summed in zip(
        tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(summed.view(tensor.shape))
