"""RULER's frequent words: made-up words whose frequencies fall as the square of their rank.

Hsieh et al., arXiv 2404.06654, section 3 (aggregation). The most frequent "word" is `...`, and the
three after it are asked for. As in lm-eval a length counts the document and the beginning of its
answer, not the 50 tokens of the answer: they come on top.
"""

import math
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from memdlm.errors import DataError
from memdlm.evaluation.tasks.ruler.draws import ORDER_SEED, Draws
from memdlm.evaluation.tasks.ruler.fitting import TokenCounter, fit, shrinking
from memdlm.evaluation.tasks.task import TaskRequest

MAX_NEW_TOKENS = 50

_QUESTION = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
_ANSWER = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)

_WORD_LENGTH = 6
_EXPONENT = 2.0
_ZETA = math.pi**2 / 6
"""Riemann's zeta function at the exponent: what the frequencies of endless ranks sum to."""

LEAST_SIZE = 53
"""From here on the word of rank four comes more often than the one of rank five."""


@dataclass(frozen=True)
class CodedDraft:
    """A drawn document: its words by rank, and how many it has about."""

    words: list[str]
    size: int

    def question(self) -> str:
        """Return the coded text with its question."""
        ranks = np.arange(1, len(self.words) + 1)
        counts = (self.size * ranks**-_EXPONENT / _ZETA).astype(int)
        text = [word for word, n in zip(self.words, counts, strict=True) for _ in range(n)]
        random.Random(ORDER_SEED).shuffle(text)
        return _QUESTION.format(context=" ".join(text))

    def text(self) -> str:
        """Return it with the beginning of the answer."""
        return self.question() + _ANSWER

    def solved(self) -> str:
        """Return the same: sizes are found without the answer."""
        return self.text()


def coded_documents(
    request: TaskRequest, length: int, count: TokenCounter
) -> tuple[list[dict[str, Any]], int]:
    """Return the documents of the task, and the tokens of an answer.

    Args:
        request: Number of documents and seed.
        length: Tokens of the document, at most.
        count: Counts tokens.

    Raises:
        TooShortError: The length does not hold words enough for their frequencies to differ.
    """
    draws, step = Draws.of(request.seed), length // 32
    size = _find_size(_drawer(draws, length), count, length, step)
    sizes = shrinking(max(size, LEAST_SIZE), step, LEAST_SIZE)
    documents = []
    for index in range(request.num_samples):
        draft, tokens = fit(_drawer(draws, length), count, length, sizes)
        documents.append(
            {
                "index": index,
                "input": draft.question(),
                "outputs": draft.words[1:4],
                "gen_prefix": _ANSWER.strip(),
                "length": tokens + MAX_NEW_TOKENS,
                "max_length": length,
            }
        )
    return documents, MAX_NEW_TOKENS


def _find_size(
    draw: Callable[[int], CodedDraft], count: TokenCounter, length: int, step: int
) -> int:
    size = length // _WORD_LENGTH
    while count(draw(size).text()) < length:
        size += step
        if size > 8 * length:
            raise DataError(
                f"the tokenizer counts fewer than {length} tokens in a document of {size} words; "
                "use one that encodes all of a text"
            )
    return size - step


def _drawer(draws: Draws, length: int) -> Callable[[int], CodedDraft]:
    """Return drafts of any size over one vocabulary, drawn now."""
    num_words = length // 50
    drawn: set[str] = set()
    while len(drawn) < num_words:
        drawn.add("".join(draws.python.choices(string.ascii_lowercase, k=_WORD_LENGTH)))
    words = sorted(drawn)
    random.Random(ORDER_SEED).shuffle(words)
    words[0] = "..."
    return lambda size: CodedDraft(words, size)
