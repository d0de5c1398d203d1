"""Parametric memory: trajectories, inner losses, fast weights and the inner loop over them."""

from memdlm.backbones.wrapping import unwrap
from memdlm.memory.artefact import Artefact, delete_memory
from memdlm.memory.config import MemoryConfig
from memdlm.memory.export import export_adapter
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import InnerPlan, InnerStats, plan_inner_loop, run_inner_loop
from memdlm.memory.inspection import describe
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.memory.placement import Placement, Site, place
from memdlm.memory.provenance import MemoryRow, PromptRecord

__all__ = [
    "Artefact",
    "FastWeights",
    "InnerPlan",
    "InnerStats",
    "MemoryConfig",
    "MemoryRow",
    "ParametricMemory",
    "Placement",
    "PromptRecord",
    "Site",
    "delete_memory",
    "describe",
    "export_adapter",
    "place",
    "plan_inner_loop",
    "run_inner_loop",
    "unwrap",
]
