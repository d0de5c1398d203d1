"""The paper's trajectory: from the pre-anchor to the anchor to clean tokens (MemDLM Eq. 5-6).

Pre-anchor x_pre masks a superset of the anchor, ratio min(1, max(s * t, t)); with K > 2 steps the
extra tokens are revealed in equal portions, and the last source is exactly the outer anchor. With
K = 1 only the pre-anchor is visited.
"""

import torch

from memdlm.diffusion.corruption import mask_more, reveal
from memdlm.diffusion.states import State
from memdlm.memory.trajectories.trajectory import (
    Trajectory,
    TrajectoryRequest,
    chain,
    realised_ratio,
)


def mask_counts(
    masked: torch.Tensor, maskable: torch.Tensor, num_steps: int, scale: float
) -> torch.Tensor:
    """Return the number of masked tokens at every step [B, K] int64.

    Args:
        masked: Masked tokens of the anchor [B] int64.
        maskable: Maskable tokens [B] int64.
        num_steps: K >= 1.
        scale: Pre-anchor scale s >= 1.
    """
    ratio = masked.float() / maskable.clamp(min=1).float()
    # float32 ratio, float64 product: the published counts depend on where each one rounds.
    start_ratio = (scale * ratio).maximum(ratio).clamp(max=1)
    start = (maskable.double() * start_ratio.double()).long()
    current = start.minimum(maskable).maximum(masked)
    counts = [current]
    for remaining in range(num_steps - 1, 0, -1):
        current = current - -((masked - current) // remaining)
        counts.append(current)
    return torch.stack(counts, dim=1)


def states_to_anchor(request: TrajectoryRequest) -> list[State]:
    """Return the K source states, noisiest first; with K >= 2 the last one is the anchor itself."""
    maskable, anchor = request.batch.maskable, request.anchor
    counts = mask_counts(
        anchor.masked.sum(dim=1),
        maskable.sum(dim=1),
        request.config.num_steps,
        request.config.pre_anchor_scale,
    )
    masked = mask_more(anchor.masked, maskable, counts[:, 0], request.generator)
    states = [request.batch.state(masked, request.mask_token_id)]
    for step in range(1, counts.shape[1] - 1):
        # Keep the anchor's masks and a random part of the others.
        extra = reveal(
            masked & ~anchor.masked,
            counts[:, step] - anchor.masked.sum(dim=1),
            request.generator,
        )
        masked = anchor.masked | extra
        states.append(request.batch.state(masked, request.mask_token_id))
    if counts.shape[1] > 1:
        states.append(anchor)
    return states


def build(request: TrajectoryRequest) -> Trajectory:
    """Return pre-anchor -> ... -> anchor -> clean, weighted by the realised mask ratios."""
    states = states_to_anchor(request)
    times = [realised_ratio(state.masked, request.batch.maskable) for state in states]
    return Trajectory(chain(states, times, request.batch.clean_state()), request.anchor)
