"""The result of a grouped product without its data, in types for which torch has no such rule.

torch computes `aten._grouped_mm` in float32 and float16 too, but can only tell the shape of the
result in bfloat16. S rows in groups, G groups.
"""

import torch


def grouped_mm_result(
    a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None = None
) -> torch.Tensor:
    """Return an uninitialised tensor of the shape and type of `aten._grouped_mm(a, b, offsets)`.

    Args:
        a: [S, k], [G, m, k], or [m, S] with sums in groups.
        b: [G, k, n], [k, S'] with columns in groups, or [S, n].
        offsets: Group ends [G]; None if both operands have three dimensions.
    """
    rows, columns = a.shape[-2], b.shape[-1]
    if a.dim() != b.dim():
        return a.new_empty(rows, columns)
    groups = a.shape[0] if a.dim() == 3 or offsets is None else offsets.shape[0]
    return a.new_empty(groups, rows, columns)
