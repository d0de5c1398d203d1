"""Trajectories: which states the inner loop visits. One file each and this table."""

from memdlm.memory.trajectories import (
    anchor_consistent,
    anchor_to_target,
    inconsistent,
    pre_anchor_only,
)
from memdlm.memory.trajectories.trajectory import (
    Trajectory,
    TrajectoryBuilder,
    TrajectoryRequest,
    Transition,
)

TRAJECTORIES: dict[str, TrajectoryBuilder] = {
    "anchor_consistent": anchor_consistent.build,
    "pre_anchor_only": pre_anchor_only.build,
    "anchor_to_target": anchor_to_target.build,
    "inconsistent": inconsistent.build,
}


def build_trajectory(request: TrajectoryRequest) -> Trajectory:
    """Build the trajectory that `request.config.trajectory` names."""
    return TRAJECTORIES[request.config.trajectory](request)


__all__ = [
    "TRAJECTORIES",
    "Trajectory",
    "TrajectoryBuilder",
    "TrajectoryRequest",
    "Transition",
    "build_trajectory",
]
