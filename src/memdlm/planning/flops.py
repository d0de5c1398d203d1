"""FLOPs of single operations: matrix products, 2 per multiply-add, as `FlopCounterMode` counts.

Adds what torch's table lacks: the grouped products of the experts, and the attention kernel of the
CPU, which every simulated step uses. A fused kernel's backward pass computes the scores again; that
is left out, so attention costs the same whichever kernel runs it.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

aten = torch.ops.aten


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


def _attention(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kw: Any
) -> int:
    """Return two products for each of the forward's two."""
    return 2 * int(sdpa_flop_count(query, key, value))


_FORMULAS = {
    **flop_registry,
    aten._grouped_mm: shape_wrapper(grouped_mm_flops),
    aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
}


def _product_4bit(inputs: torch.Size, packed: torch.Size, shape: Any, *args: Any, **kw: Any) -> int:
    """Count the product with a 4-bit matrix of `shape` [out, in], where no gradient is wanted."""
    return 2 * math.prod(inputs) * int(shape[0])


# Operations of libraries that need not be installed.
_NAMED = {"bitsandbytes.gemm_4bit": shape_wrapper(_product_4bit)}


def operation_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the FLOPs of one dispatched operation; 0 for all that are no matrix products."""
    operation = getattr(func, "overloadpacket", func)
    formula = _FORMULAS.get(operation) or _NAMED.get(str(operation))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
