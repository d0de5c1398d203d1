"""Ablation: one step on the anchor itself, whose next state is clean."""

from memdlm.memory.trajectories.trajectory import Trajectory, TrajectoryRequest, Transition


def build(request: TrajectoryRequest) -> Trajectory:
    """Return anchor -> clean, weighted by the sampled time."""
    step = Transition(request.anchor, request.batch.clean_state(), request.t)
    return Trajectory((step,), request.anchor)
