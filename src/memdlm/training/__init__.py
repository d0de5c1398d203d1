"""Training: outer step, Trainer subclass, metrics, guard. Import it late: it pulls in Trainer."""

from memdlm.training.config import MemDLMConfig
from memdlm.training.outer_step import OuterStep, StepPlan, plan_step
from memdlm.training.trainer import MemDLMTrainer

__all__ = ["MemDLMConfig", "MemDLMTrainer", "OuterStep", "StepPlan", "plan_step"]
