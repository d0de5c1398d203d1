"""Seeded long-context tasks of our own wording, at any length, with disjoint splits."""

from memdlm.data.tasks.config import SPLITS, Example, TaskConfig
from memdlm.data.tasks.scoring import Score, chance_level, score_text
from memdlm.data.tasks.table import TASKS, Task, generate_examples
from memdlm.data.tasks.words import vocabulary

__all__ = [
    "SPLITS",
    "TASKS",
    "Example",
    "Score",
    "Task",
    "TaskConfig",
    "chance_level",
    "generate_examples",
    "score_text",
    "vocabulary",
]
