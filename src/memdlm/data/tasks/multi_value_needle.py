"""Names keep several values each, in places far apart; all values of one name are asked for."""

import random

from memdlm.data.tasks.config import TaskConfig
from memdlm.data.tasks.story import Story, draw_names, num_facts
from memdlm.data.tasks.words import KEEP_VERBS, draw_values


def build(config: TaskConfig, length: int, rng: random.Random) -> Story:
    """Return a story in which each name keeps one value and later adds `num_values - 1` more."""
    per_name = config.num_values
    names = draw_names(rng, max(2, num_facts(config, length, needed=2 * per_name) // per_name))
    owners = names * per_name
    rng.shuffle(owners)
    pairs = list(zip(owners, draw_values(rng, config.split, len(owners)), strict=True))
    facts, met = [], set()
    for owner, value in pairs:
        verb = "adds" if owner in met else rng.choice(KEEP_VERBS)
        facts.append(f"{owner} {verb} {value} .")
        met.add(owner)
    asked = rng.choice(names)
    answers = [value for owner, value in pairs if owner == asked]
    return Story(
        facts=facts,
        evidence=[fact for fact, (owner, _) in enumerate(pairs) if owner == asked],
        question=f"question : what does {asked} keep ? answer : {asked} keeps",
        completion=f" and {asked} adds ".join(answers),
        answers=answers,
        candidates=[value for _, value in pairs],
    )
