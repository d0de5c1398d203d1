"""One name keeps several values, in places far apart; all of them are asked for."""

import random

from memdlm.data.tasks.config import TaskConfig
from memdlm.data.tasks.story import Story, draw_names, num_facts
from memdlm.data.tasks.words import KEEP_VERBS, draw_values


def build(config: TaskConfig, length: int, rng: random.Random) -> Story:
    """Return a story in which the asked name keeps `num_values` values."""
    count = num_facts(config, length, needed=config.num_values + 1)
    others = draw_names(rng, count - config.num_values + 1)
    asked = others.pop()
    owners = others + [asked] * config.num_values
    rng.shuffle(owners)
    values = draw_values(rng, config.split, count)
    pairs = list(zip(owners, values, strict=True))
    answers = [value for owner, value in pairs if owner == asked]
    return Story(
        facts=[f"{owner} {rng.choice(KEEP_VERBS)} {value} ." for owner, value in pairs],
        question=f"question : what does {asked} keep ? answer : {asked} keeps",
        completion=" and ".join(answers),
        answers=answers,
        candidates=values,
    )
