"""Arithmetic in the place of a tensor that nobody else holds: less memory to walk through."""

import torch


def multiply_fresh(fresh: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return `fresh * factor`, written over `fresh` where no gradient may need it.

    Args:
        fresh: Made by the caller, who looks at it no more. Not what a module returned: a hook of
            the user's may have kept that.
        factor: Broadcasts to it.
    """
    if torch.is_grad_enabled() or torch.result_type(fresh, factor) != fresh.dtype:
        return fresh * factor
    return fresh.mul_(factor)
