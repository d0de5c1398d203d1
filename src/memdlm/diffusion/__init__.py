"""The masked diffusion process: schedule, corruption, supervision, objective. Needs torch only."""

from memdlm.diffusion.corruption import corrupt, draw_time
from memdlm.diffusion.objective import ObjectiveConfig, coefficients
from memdlm.diffusion.schedule import SCHEDULES, Schedule, get_schedule
from memdlm.diffusion.states import CleanBatch, State
from memdlm.diffusion.supervision import Supervision

__all__ = [
    "SCHEDULES",
    "CleanBatch",
    "ObjectiveConfig",
    "Schedule",
    "State",
    "Supervision",
    "coefficients",
    "corrupt",
    "draw_time",
    "get_schedule",
]
