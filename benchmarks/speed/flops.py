"""FLOPs of a step, counted operation by operation on the meta device: nothing is computed.

Counts matrix products only (2 per multiply-add), forward and backward, as `FlopCounterMode` does,
and adds the grouped products of the experts, which it does not know. On the meta device attention
is a pair of batched products, so it is counted without naming a kernel; a fused kernel's backward
pass recomputes one of them, which is not counted.
"""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from memdlm.planning.flops import grouped_mm_flops


def count_flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of everything that `run` does."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_mm_flops}
    )
    with counter:
        run()
    return counter.get_total_flops()
