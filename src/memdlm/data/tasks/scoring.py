"""Score a decoded text against an example, and say what guessing would score.

A value counts only if all its words stand together in the text. Special tokens must be gone.
"""

import math
from dataclasses import dataclass

from memdlm.data.tasks.config import Example
from memdlm.data.tasks.table import TASKS


@dataclass(frozen=True)
class Score:
    """How much of an answer is right."""

    exact: bool
    """The whole completion is right, word for word (in any order where the task allows it)."""
    recall: float
    """Share of the expected answers that the text holds, in [0, 1]."""


def score_text(example: Example, text: str) -> Score:
    """Compare a decoded text with the example's answers."""
    words = text.split()
    found = sum(_holds(words, answer.split()) for answer in example["answers"])
    expected = example["completion"].split()
    exact = words == expected
    if TASKS[example["task"]].any_order:
        exact = found == len(example["answers"]) and len(words) == len(expected)
    return Score(exact=exact, recall=found / len(example["answers"]))


def chance_level(example: Example) -> float:
    """Return the chance of an exact answer when values are picked blindly among those present.

    Names on the way (chains, stories) are taken as known, so this is an upper bound.
    """
    num_values = sum(answer in example["candidates"] for answer in example["answers"])
    return 1.0 / math.comb(len(example["candidates"]), num_values)


def _holds(words: list[str], answer: list[str]) -> bool:
    return any(words[i : i + len(answer)] == answer for i in range(len(words) - len(answer) + 1))
