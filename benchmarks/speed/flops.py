"""FLOPs of a step, counted operation by operation on the meta device: nothing is computed.

Counts matrix products only (2 per multiply-add), forward and backward, as `FlopCounterMode` does,
and adds the grouped products of the experts, which it does not know. On the meta device attention
is a pair of batched products, so it is counted without naming a kernel; a fused kernel's backward
pass recomputes one of them, which is not counted.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def grouped_mm_flops(a: torch.Size, b: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of `aten._grouped_mm` for operands of shapes `a` and `b`.

    Whatever the groups' sizes, each row meets one matrix only:

        [S, in] x [G, in, out]   rows in groups     forward, and gradient of the input
        [m, S] x [S, n]          sums in groups     gradient of the weights
        [G, m, k] x [k, n]       columns in groups
        [G, m, k] x [G, k, n]    ordinary batch
    """
    groups = a[0] if len(a) == len(b) == 3 else 1
    return 2 * groups * a[-2] * a[-1] * b[-1]


def count_flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of everything that `run` does."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_mm_flops}
    )
    with counter:
        run()
    return counter.get_total_flops()
