"""Ablation: one step on the pre-anchor, whose next state is the anchor."""

from dataclasses import replace

from memdlm.memory.trajectories.anchor_consistent import states_to_anchor
from memdlm.memory.trajectories.trajectory import (
    Trajectory,
    TrajectoryRequest,
    Transition,
    realised_ratio,
)


def build(request: TrajectoryRequest) -> Trajectory:
    """Return pre-anchor -> anchor."""
    single = replace(request, config=replace(request.config, num_steps=1))
    (pre_anchor,) = states_to_anchor(single)
    t = realised_ratio(pre_anchor.masked, request.batch.maskable)
    return Trajectory((Transition(pre_anchor, request.anchor, t),), request.anchor)
