"""RULER's score: how many of the expected answers a response contains."""

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(response: str, answers: Sequence[str]) -> float:
    """Return the share of answers, in [0, 1], that stand anywhere in the response, in any case.

    White space around the response and control characters do not count, as in RULER's
    `string_match_all` and lm-eval's.

    Args:
        response: What a model wrote.
        answers: What is expected, at least one.
    """
    text = _CONTROL.sub("\n", response.strip()).strip().lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)
