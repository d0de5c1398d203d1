"""BABILong's stricter, official comparison of an answer with the target (its `metrics.py`).

lm-eval counts an answer that holds the target anywhere, so that naming all six places is right;
here the target has to be the only label that the answer's first sentence adds to the question.
"""

import re

_PLACES = frozenset({"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"})

LABELS: dict[str, frozenset[str]] = {
    "qa1": _PLACES,
    "qa2": _PLACES,
    "qa3": _PLACES,
    "qa4": _PLACES,
    "qa5": frozenset({"bill", "fred", "jeff", "mary", "apple", "football", "milk"}),
}
"""What the answers of a task can be, in lower case."""


def only_label(target: str, answer: str, question: str, labels: frozenset[str]) -> bool:
    """Tell whether the target is the only label in the answer's first sentence.

    Labels in the question do not count, as they are never what is asked for. Labels are looked for
    as substrings and without case, as the benchmark does.
    """
    # Models that continue the prompt's pattern open a new context or example after their answer.
    first = re.split(r"\.|<context>|<example>", answer.lower(), maxsplit=1)[0]
    asked = question.lower()
    named = {label for label in labels if label in first and label not in asked}
    return named == {target.lower()}
