"""The table of generated tasks; a new task is one file and one row."""

import difflib
import random
from collections.abc import Callable
from dataclasses import dataclass

from memdlm.data.tasks import (
    common_words,
    multi_value_needle,
    single_needle,
    two_fact_story,
    variable_tracking,
)
from memdlm.data.tasks.config import Example, TaskConfig
from memdlm.data.tasks.story import Story, write_story
from memdlm.errors import ConfigError
from memdlm.seeding import derive_seed


@dataclass(frozen=True)
class Task:
    """How to build one story of a task, and whether its answers may come in any order."""

    build: Callable[[TaskConfig, int, random.Random], Story]
    any_order: bool = False


TASKS: dict[str, Task] = {
    "single_needle": Task(single_needle.build),
    "multi_value_needle": Task(multi_value_needle.build, any_order=True),
    "variable_tracking": Task(variable_tracking.build),
    "common_words": Task(common_words.build),
    "two_fact_story": Task(two_fact_story.build),
}


def generate_examples(config: TaskConfig) -> list[Example]:
    """Generate `config.num_examples` examples, the named tasks in turn.

    Each example depends only on the settings and its own index, not on how many there are.

    Raises:
        ConfigError: A task is unknown, or the length cannot hold a task's facts.
    """
    for name in config.tasks:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1) or list(TASKS)
            raise ConfigError(f"tasks: unknown task {name!r}; did you mean {near[0]!r}?")
    return [_generate_one(config, index) for index in range(config.num_examples)]


def _generate_one(config: TaskConfig, index: int) -> Example:
    name = config.tasks[index % len(config.tasks)]
    rng = random.Random(derive_seed(config.seed, f"tasks/{config.split}/{name}", index))
    length = config.length
    if config.shortest_length is not None:
        length = rng.randint(config.shortest_length, config.length)
    return write_story(TASKS[name].build(config, length, rng), name, length, rng)
