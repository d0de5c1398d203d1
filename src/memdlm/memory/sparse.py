"""Fast weights without what was never written: the form that is kept, shown and exported.

A matrix whose second factor (B, or the full delta) is all zeros has no effect, whatever its A: an
expert that saw no token, a layer beyond the gradient. Only the others are stored:

    <row>.<site>.A        [r, in], or [n, r, in] for a stack of experts
    <row>.<site>.B        [out, r], or [n, out, r]
    <row>.<site>.delta    [out, in], or [n, out, in], in place of A and B
    <row>.<site>.experts  [n] int32: which experts these are, ascending

A site with nothing written has no tensor at all. All float32 on the CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from memdlm.memory.fast_weights import PARTS, FastWeights
from memdlm.memory.placement import Site


@dataclass(frozen=True)
class SiteDelta:
    """What one memory has at one site.

    Attributes:
        site: The adapted projection.
        experts: Which experts were written, ascending; None for a plain linear layer.
        tensors: `A` and `B`, or `delta`, stacked over `experts` if any.
    """

    site: Site
    experts: tuple[int, ...] | None
    tensors: dict[str, torch.Tensor]

    def norm(self, scale: float) -> float:
        """Return the Frobenius norm of scale * B A (of all experts together), or of the delta.

        B A is never built: |B A|^2 = trace((B^T B) (A A^T)), r x r matrices. In float64.
        """
        if "delta" in self.tensors:
            return float(self.tensors["delta"].double().norm())
        a, b = self.tensors["A"].double(), self.tensors["B"].double()
        square = ((b.mT @ b) * (a @ a.mT)).sum()
        return float(scale * square.clamp(min=0).sqrt())


def compress(fast: FastWeights) -> dict[str, torch.Tensor]:
    """Return what was written, under the names above."""
    stored: dict[str, torch.Tensor] = {}
    for row in range(fast.num_rows):
        for site in fast.placement.sites:
            tensors = {
                name.rsplit(".", 1)[1]: fast.tensors[name][row].detach().cpu()
                for name in fast.names(site)
            }
            effect = tensors["delta"] if "delta" in tensors else tensors["B"]
            prefix = f"{row}.{site.name}"
            if site.num_experts is not None:
                written = effect.flatten(1).ne(0).any(dim=1).nonzero()[:, 0]
                if not len(written):
                    continue
                stored[f"{prefix}.experts"] = written.to(torch.int32)
                tensors = {part: tensor[written] for part, tensor in tensors.items()}
            elif not bool(effect.any()):
                continue
            for part, tensor in tensors.items():
                stored[f"{prefix}.{part}"] = tensor.contiguous()
    return stored


def expand(stored: Mapping[str, torch.Tensor], fast: FastWeights) -> None:
    """Put what was written into `fast`, which holds phi_0 of the same sites and rows.

    Raises:
        ValueError: A tensor has no place in `fast`, another shape, or is missing.
    """
    left = set(stored)
    for row in range(fast.num_rows):
        for site in fast.placement.sites:
            delta = site_delta(stored, row, site)
            if delta is None:
                continue
            names = {name.rsplit(".", 1)[1]: name for name in fast.names(site)}
            if names.keys() != delta.tensors.keys():
                raise ValueError(f"{row}.{site.name} has {sorted(delta.tensors)}")
            for part, tensor in delta.tensors.items():
                target = fast.tensors[names[part]][row]
                where = ... if delta.experts is None else list(delta.experts)
                if target[where].shape != tensor.shape:
                    raise ValueError(f"{row}.{site.name}.{part} is {list(tensor.shape)}")
                target[where] = tensor.to(target)
                left.discard(f"{row}.{site.name}.{part}")
            left.discard(f"{row}.{site.name}.experts")
    if left:
        raise ValueError(f"{sorted(left)[0]} has no place")


def site_delta(stored: Mapping[str, torch.Tensor], row: int, site: Site) -> SiteDelta | None:
    """Return what memory `row` has at `site`; None if nothing was written there.

    Raises:
        ValueError: Experts are not named, or out of range.
    """
    prefix = f"{row}.{site.name}"
    tensors = {part: stored[f"{prefix}.{part}"] for part in PARTS if f"{prefix}.{part}" in stored}
    if not tensors:
        return None
    if site.num_experts is None:
        return SiteDelta(site, None, tensors)
    if f"{prefix}.experts" not in stored:
        raise ValueError(f"{prefix}.experts is missing")
    experts = tuple(stored[f"{prefix}.experts"].tolist())
    if not all(0 <= expert < site.num_experts for expert in experts):
        raise ValueError(f"{prefix}.experts is out of range")
    return SiteDelta(site, experts, tensors)
