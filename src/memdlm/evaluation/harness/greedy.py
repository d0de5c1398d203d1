"""Whether a model would write a continuation itself, where somebody asks.

It takes a decode of as many steps as the continuation has tokens, and choosing among answers never
looks at it. An answer that was not computed must not pass for "no" all the same.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from memdlm.errors import ConfigError, UsageError

GREEDY_CHECKS = ("auto", "on", "off")


@dataclass(frozen=True)
class NotChecked:
    """Stands for a yes or no that was not computed; asking which of the two is an error.

    Raises:
        UsageError: It is used as a truth value or a number.
    """

    def _refuse(self) -> NoReturn:
        raise UsageError(
            "the task asks whether the model would write a continuation greedily, which was not "
            "computed (greedy_check: auto leaves it out where a document has several "
            "continuations): set greedy_check to on"
        )

    def __bool__(self) -> bool:
        self._refuse()

    def __int__(self) -> int:
        self._refuse()

    def __float__(self) -> float:
        self._refuse()

    def __repr__(self) -> str:
        return "not checked"


def wants_greedy(requests: Sequence[Any], greedy_check: str) -> list[bool]:
    """Return for each request of lm-eval whether the greedy answer is to be compared.

    Args:
        requests: lm-eval's instances.
        greedy_check: `on`, `off`, or `auto`: for documents with a single request, as in tasks that
            score a text (LAMBADA), and not for those with several, which are choices.

    Raises:
        ConfigError: `greedy_check` is unknown.
    """
    if greedy_check not in GREEDY_CHECKS:
        raise ConfigError(
            f"greedy_check: {greedy_check!r} is not one of {', '.join(GREEDY_CHECKS)}"
        )
    if greedy_check != "auto":
        return [greedy_check == "on"] * len(requests)
    # A repeated request is one object several times over.
    distinct = {id(request): (request.task_name, request.doc_id) for request in requests}
    per_document = Counter(distinct.values())
    return [
        request.doc_id is None or per_document[request.task_name, request.doc_id] == 1
        for request in requests
    ]
