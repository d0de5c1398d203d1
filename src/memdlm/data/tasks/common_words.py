"""Noted words, one of them noted more often than any other; the common one is asked for."""

import random

from memdlm.data.tasks.config import TaskConfig
from memdlm.data.tasks.story import Story, num_facts
from memdlm.data.tasks.words import draw_values


def build(config: TaskConfig, length: int, rng: random.Random) -> Story:
    """Return a story that notes one value `num_repeats` times and each other value once."""
    count = num_facts(config, length, needed=config.num_repeats + 2)
    values = draw_values(rng, config.split, count - config.num_repeats + 1)
    common = rng.choice(values)
    notes = values + [common] * (config.num_repeats - 1)
    rng.shuffle(notes)
    return Story(
        facts=[f"note : {value} ." for value in notes],
        evidence=[fact for fact, value in enumerate(notes) if value == common],
        question="question : which word is most often ? answer : the word is",
        completion=common,
        answers=[common],
        candidates=values,
    )
