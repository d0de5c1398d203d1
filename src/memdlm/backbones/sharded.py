"""Lets gradients be taken in the middle of a forward of a backbone that FSDP2 has sharded.

FSDP2 takes the end of any backward pass for the end of the training step: it then gives up the
gathered weights of every module and forgets in which order they were used. The inner loop, and a
chunked loss that takes the head's gradient at once, do so while the outer forward or its backward
still needs them (the last norm and the head, at least). This is the one file that reads what FSDP2
keeps to itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed, nn


@contextmanager
def forward_goes_on(module: nn.Module) -> Iterator[None]:
    """Keep gathered weights over the backward passes within the block; harmless without FSDP2.

    Args:
        module: The backbone; wrappers around it, which FSDP2 may have made its root, are found.
    """
    states = _states(module)
    if not states:
        yield
        return
    groups = [group for state in states for group in state._fsdp_param_groups]
    before = [group.reshard_after_backward for group in groups]
    context = states[0]._state_ctx
    was_last = context.is_last_backward
    try:
        context.is_last_backward = False
        for group in groups:
            group.reshard_after_backward = False
        yield
    finally:
        context.is_last_backward = was_last
        for group, value in zip(groups, before, strict=True):
            group.reshard_after_backward = value


def _states(module: nn.Module) -> list[Any]:
    """Return the FSDP2 states of the whole model that `module` is a part of."""
    if not distributed.is_available() or not distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            return list(part._get_fsdp_state()._state_ctx.all_states)
    return []
