"""Several memories side by side, one per row of a batch; knows tensors, not models."""

from collections.abc import Sequence

import torch

from memdlm.errors import UsageError
from memdlm.memory.fast_weights import FastWeights, stack_rows


def stack_memories(parts: Sequence[FastWeights | None]) -> FastWeights:
    """Return one object with the rows of all parts, in order; None is a row of zeros, no effect.

    The parts must be alike (`check_alike`), and one of them not None.
    """
    first = next(part for part in parts if part is not None)
    tensors = {}
    for site in first.placement.sites:
        for name in first.names(site):
            blank = torch.zeros_like(first.tensors[name][0])
            rows = [
                row
                for part in parts
                for row in ([blank] if part is None else part.tensors[name].unbind())
            ]
            tensors[name] = stack_rows(rows, site)
    return FastWeights.of(first.placement, first.scale, tensors)


def check_alike(first: FastWeights, other: FastWeights) -> None:
    """Refuse memories that cannot share a batch.

    Raises:
        UsageError: They differ in sites, kind, rank or scale.
    """
    ours = {name: tuple(tensor.shape[1:]) for name, tensor in first.tensors.items()}
    theirs = {name: tuple(tensor.shape[1:]) for name, tensor in other.tensors.items()}
    if ours.keys() != theirs.keys():
        differing = sorted(ours.keys() ^ theirs.keys())[0]
        raise UsageError(
            "memories of one batch must adapt the same modules in the same way; only some have "
            f"{differing}: write them with the same kind, scope, modules and layer_fraction"
        )
    for name, shape in ours.items():
        if shape != theirs[name]:
            raise UsageError(
                f"memories of one batch must have one rank; {name} is {list(shape)} in one and "
                f"{list(theirs[name])} in another: write them with the same memory.rank"
            )
    if first.scale != other.scale:
        raise UsageError(
            f"memories of one batch must have one scale; alpha / rank is {first.scale:g} in one "
            f"and {other.scale:g} in another: write them with the same memory.alpha"
        )
