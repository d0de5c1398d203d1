"""Things are with persons and persons enter places: where a thing is takes two facts.

In the manner of bAbI's second task, in our own words; the answer names both facts.
"""

import random

from memdlm.data.tasks.config import TaskConfig
from memdlm.data.tasks.story import Story, draw_names, num_facts
from memdlm.data.tasks.words import draw_values


def build(config: TaskConfig, length: int, rng: random.Random) -> Story:
    """Return a story of persons, each with one thing and `num_moves` places; the last counts."""
    per_person = 1 + config.num_moves
    count = max(2, num_facts(config, length, needed=2 * per_person) // per_person)
    names = draw_names(rng, 2 * count)
    persons, things = names[:count], names[count:]
    values = draw_values(rng, config.split, count * config.num_moves)
    order = [person for person in range(count) for _ in range(per_person)]
    rng.shuffle(order)
    joins = {person: rng.randrange(per_person) for person in range(count)}
    seen = [0] * count
    last_place: dict[int, str] = {}
    join_fact: dict[int, int] = {}
    last_fact: dict[int, int] = {}
    places = iter(values)
    facts: list[str] = []
    for person in order:
        if seen[person] == joins[person]:
            join_fact[person] = len(facts)
            facts.append(f"{things[person]} joined {persons[person]} .")
        else:
            last_place[person] = next(places)
            last_fact[person] = len(facts)
            facts.append(f"{persons[person]} entered {last_place[person]} .")
        seen[person] += 1
    asked = rng.randrange(count)
    thing, person_name = things[asked], persons[asked]
    return Story(
        facts=facts,
        evidence=[join_fact[asked], last_fact[asked]],
        question=f"question : where is {thing} ? answer : {thing} joined",
        completion=f"{person_name} entered {last_place[asked]}",
        answers=[person_name, last_place[asked]],
        candidates=values,
    )
