"""Ablation: a trajectory that ignores the anchor ("inconsistent" in the paper).

It starts from a fresh Bernoulli mask (ratio 0.8) and reveals linearly down to the target ratio.
"""

import torch

from memdlm.diffusion.corruption import reveal
from memdlm.memory.trajectories.trajectory import Trajectory, TrajectoryRequest, chain


def planned_ratios(start: float, end: float, num_steps: int) -> torch.Tensor:
    """Return the mask ratio planned for every step [K] float32; only `start` when K = 1."""
    return torch.linspace(start, end, num_steps)


def build(request: TrajectoryRequest) -> Trajectory:
    """Return K states of falling mask ratio, the last one leading to clean tokens."""
    config, batch = request.config, request.batch
    ratios = planned_ratios(
        config.inconsistent_start_ratio, config.prompt_mask_ratio, config.num_steps
    )
    draws = torch.rand(batch.clean.shape, generator=request.generator)
    masked = batch.maskable & (draws < ratios[0])
    states = [batch.state(masked, request.mask_token_id)]
    total = batch.maskable.sum(dim=1)
    for ratio in ratios[1:]:
        count = (total * ratio).long().minimum(masked.sum(dim=1))
        masked = reveal(masked, count, request.generator)
        states.append(batch.state(masked, request.mask_token_id))
    times = [ratio.expand(batch.clean.shape[0]) for ratio in ratios]
    return Trajectory(chain(states, times, batch.clean_state()), request.anchor)
