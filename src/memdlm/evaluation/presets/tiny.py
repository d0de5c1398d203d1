"""The tiny counterpart: the quickstart's recipe and tasks in place of the paper's.

A network of four layers cannot read English, so every benchmark becomes the generated task of its
kind, and lengths count words: 96, what it is trained on, for the paper's 4k and less, 192 for 8k,
384 beyond. The last 5, 10 and 25 % of its layers are all its last one: those variants are equal.
"""

from collections.abc import Sequence
from typing import Any

from memdlm.evaluation.tasks.task import split_name

# As `memdlm quickstart` trains (memdlm.quickstart.run); the command that uses this adds the model,
# the quickstart's start. Without rows to evaluate on: the tasks are the evaluation.
TINY_RECIPE: dict[str, Any] = {
    "data": {
        "max_length": 104,
        "test_fraction": 0.0,
        "tasks": {"length": 96, "shortest_length": 64, "num_examples": 9600, "seed": 0},
    },
    "objective": {"padding": "excluded"},
    "memory": {"learning_rate": 0.02},
    "training": {
        "max_steps": 300,
        "save_steps": 100,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 32,
        "train_sampling_strategy": "random",
    },
    "seed": 0,
}

_KINDS = {
    "niah_multivalue": "generated_multi_value_needle",
    "ruler_vt": "generated_variable_tracking",
    "ruler_cwe": "generated_common_words",
    "babilong": "generated_two_fact_story",
}


def tiny_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the generated counterparts of tasks and groups, once each, in order."""
    return tuple(dict.fromkeys(_counterpart(name) for name in tasks))


def _counterpart(name: str) -> str:
    base, length = split_name(name)
    if length is None:
        return "generated@96"
    words = 96 if length <= 4096 else 192 if length <= 8192 else 384
    return f"{_KINDS[base]}@{words}"
