"""Parametric memory: trajectories, inner losses, fast weights and the inner loop over them."""

from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import InnerPlan, InnerStats, plan_inner_loop, run_inner_loop
from memdlm.memory.parametric_memory import ParametricMemory, unwrap
from memdlm.memory.placement import Placement, Site, place

__all__ = [
    "FastWeights",
    "InnerPlan",
    "InnerStats",
    "MemoryConfig",
    "ParametricMemory",
    "Placement",
    "Site",
    "place",
    "plan_inner_loop",
    "run_inner_loop",
    "unwrap",
]
