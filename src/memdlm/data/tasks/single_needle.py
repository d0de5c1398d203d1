"""One name is asked for; every other fact has the same form and another name."""

import random

from memdlm.data.tasks.config import TaskConfig
from memdlm.data.tasks.story import Story, draw_names, num_facts
from memdlm.data.tasks.words import KEEP_VERBS, draw_values


def build(config: TaskConfig, length: int, rng: random.Random) -> Story:
    """Return a story in which the asked name keeps one value."""
    count = num_facts(config, length, needed=2)
    names, values = draw_names(rng, count), draw_values(rng, config.split, count)
    facts = [
        f"{name} {rng.choice(KEEP_VERBS)} {value} ."
        for name, value in zip(names, values, strict=True)
    ]
    asked = rng.randrange(count)
    return Story(
        facts=facts,
        evidence=[asked],
        question=f"question : what does {names[asked]} keep ? answer : {names[asked]} keeps",
        completion=values[asked],
        answers=[values[asked]],
        candidates=values,
    )
