"""What a task returns, and how its facts and filler become a text of the wanted length.

Knows nothing of any one task. Facts keep the order the task gives them (a later move overrides an
earlier one); filler sentences fall between them at random, so that no position tells the answer.
"""

import random
from dataclasses import dataclass
from itertools import accumulate

from memdlm.data.tasks.config import Example, TaskConfig
from memdlm.data.tasks.words import NAMES, SHORTEST_FILLER, filler_sentence
from memdlm.errors import ConfigError


@dataclass(frozen=True)
class Story:
    """A task's content, before filler; `evidence` are the facts the answer follows from."""

    facts: list[str]
    evidence: list[int]
    question: str
    completion: str
    answers: list[str]
    candidates: list[str]


def num_facts(config: TaskConfig, length: int, needed: int) -> int:
    """Return how many facts a text of `length` words gets: the density's, at least `needed`.

    The number of names bounds it; a still longer text has more filler instead.
    """
    wanted = round(config.facts_per_100_words * length / 100)
    return max(needed, min(wanted, len(NAMES)))


def draw_names(rng: random.Random, count: int) -> list[str]:
    """Draw `count` different names.

    Raises:
        ConfigError: There are not that many names.
    """
    if count > len(NAMES):
        raise ConfigError(f"tasks: {count} names needed, only {len(NAMES)} exist; lower the counts")
    return rng.sample(NAMES, count)


def write_story(story: Story, task: str, length: int, rng: random.Random) -> Example:
    """Hide a story's facts in filler so that prompt and completion have about `length` words.

    The result is never longer, and at most `SHORTEST_FILLER - 1` words shorter.

    Raises:
        ConfigError: The facts alone are longer than that.
    """
    taken = sum(len(part.split()) for part in (*story.facts, story.question, story.completion))
    if taken > length:
        raise ConfigError(
            f"tasks: {task} needs {taken} words, length is {length}; "
            "raise length or lower facts_per_100_words"
        )
    sentences: list[list[str]] = []
    while length - taken >= SHORTEST_FILLER:
        sentences.append(filler_sentence(rng, length - taken))
        taken += len(sentences[-1])
    places = sorted(rng.sample(range(len(story.facts) + len(sentences)), len(story.facts)))
    fact_at = dict(zip(places, story.facts, strict=True))
    fillers = iter(sentences)
    total = len(places) + len(sentences)
    text = [fact_at[i] if i in fact_at else " ".join(next(fillers)) for i in range(total)]
    starts = list(accumulate((len(sentence) + 1 for sentence in text), initial=0))
    evidence = [places[fact] for fact in sorted(story.evidence)]
    return Example(
        prompt=" ".join([*text, story.question]),
        completion=story.completion,
        task=task,
        answers=story.answers,
        candidates=story.candidates,
        evidence=[(starts[i], starts[i] + len(text[i])) for i in evidence],
        question=story.question,
    )
