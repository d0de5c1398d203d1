"""Chains of names: each copies the next one, the last keeps a value; the chain is asked for."""

import random
from itertools import pairwise

from memdlm.data.tasks.config import TaskConfig
from memdlm.data.tasks.story import Story, draw_names, num_facts
from memdlm.data.tasks.words import draw_values


def build(config: TaskConfig, length: int, rng: random.Random) -> Story:
    """Return a story of several chains of `num_hops` statements, in any order, and ask for one."""
    hops = config.num_hops
    num_chains = max(2, num_facts(config, length, needed=2 * hops) // hops)
    names = draw_names(rng, num_chains * hops)
    values = draw_values(rng, config.split, num_chains)
    chains = [names[i * hops : (i + 1) * hops] for i in range(num_chains)]
    facts = [
        f"{name} copies {following} ." for chain in chains for name, following in pairwise(chain)
    ]
    facts += [f"{chain[-1]} keeps {value} ." for chain, value in zip(chains, values, strict=True)]
    rng.shuffle(facts)
    asked = rng.randrange(num_chains)
    start, *rest = chains[asked]
    path = "".join(f"{name} copies " for name in rest[:-1])
    path += f"{rest[-1]} keeps " if rest else ""
    verb = "copies" if rest else "keeps"
    return Story(
        facts=facts,
        evidence=[i for i, fact in enumerate(facts) if fact.split()[0] in chains[asked]],
        question=f"question : follow {start} ? answer : {start} {verb}",
        completion=path + values[asked],
        answers=[*rest, values[asked]],
        candidates=values,
    )
