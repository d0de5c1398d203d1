"""One inner SGD step with clipping (MemDLM Eq. 9): phi <- phi - eta * clip(g).

Local clipping, the paper's default, treats every A, B or delta matrix on its own (every expert's
too): g *= c / (|g| + 1e-12) if |g| > c. Global clipping uses one norm over all of a memory's
matrices. Everything stays on the device; nothing is read back. Shapes: b memories.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

# As in the published code; the golden fast weights include it.
_CLIP_EPSILON = 1e-12


@dataclass(frozen=True)
class UpdateStats:
    """What an update saw, per memory [b] on the device.

    Attributes:
        grad_norm: Joint gradient norm before clipping.
        num_clipped: Matrices whose gradient was clipped.
        is_finite: Whether every gradient was finite.
    """

    grad_norm: torch.Tensor
    num_clipped: torch.Tensor
    is_finite: torch.Tensor


def sgd_step(
    tensors: Mapping[str, torch.Tensor],
    grads: Mapping[str, torch.Tensor],
    *,
    learning_rate: float,
    clip_norm: float | None,
    clip_scope: str,
    alive: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], UpdateStats]:
    """Return the next fast weights, detached, and what happened.

    Args:
        tensors: Fast weights [b, ..., m, n].
        grads: Their gradients, same names and shapes.
        learning_rate: eta.
        clip_norm: Threshold c, or None for no clipping.
        clip_scope: `local` or `global`.
        alive: Memories [b] bool that may still change.
    """
    norms = {
        name: torch.linalg.vector_norm(grad, dim=(-2, -1), keepdim=True)
        for name, grad in grads.items()
    }
    squares = torch.stack([norm.flatten(1).square().sum(dim=1) for norm in norms.values()])
    joint = squares.sum(dim=0).sqrt()  # [b]
    is_finite = joint.isfinite()
    alive = alive & is_finite
    updated, clipped = {}, torch.zeros_like(joint)
    for name, grad in grads.items():
        lead = [-1] + [1] * (grad.dim() - 1)
        if clip_norm is not None:
            norm = norms[name] if clip_scope == "local" else joint.view(lead)
            exceeds = norm > clip_norm
            grad = grad * torch.where(exceeds, clip_norm / (norm + _CLIP_EPSILON), 1.0)
            clipped = clipped + exceeds.expand(norms[name].shape).flatten(1).sum(dim=1)
        step = tensors[name].detach() - learning_rate * grad
        updated[name] = torch.where(alive.view(lead), step, tensors[name].detach())
    return updated, UpdateStats(joint, clipped, is_finite)
