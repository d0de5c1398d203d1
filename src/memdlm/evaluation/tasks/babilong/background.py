"""The text that hides the facts: a book's sentences and what each costs in tokens.

As the official generator does it, sentences are consecutive, those of fewer than ten tokens are
left out, and the last one is cut where the length is reached (here at a word, there at a token).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from memdlm.data.babi import read_text
from memdlm.errors import DataError

MIN_SENTENCE_TOKENS = 10

# A sentence ends at a mark, or at the quotation mark or bracket that closes after it.
_END = re.compile(r"(?<=[.?!])\s+|(?<=[.?!][\"'\u2019\u201d)\]])\s+")
_BOOK = re.compile(
    r"\*\*\* ?START OF TH[^\n]*\*\*\*(.*?)"
    r"(?:\*\*\* ?END OF TH|End of (?:the )?Project Gutenberg|\Z)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Background:
    """Sentences of a text that are long enough, and the tokens of each with a blank before it."""

    sentences: tuple[str, ...]
    sizes: tuple[int, ...]
    source: str

    def take(self, start: int, budget: int) -> list[str]:
        """Return consecutive sentences from `start` on, of at most about `budget` tokens together.

        Goes on at the beginning after the last sentence. The last sentence taken may be cut.

        Raises:
            DataError: The whole text is shorter than that.
        """
        if sum(self.sizes) < budget:
            raise DataError(
                f"{self.source}: {sum(self.sizes)} tokens in sentences of {MIN_SENTENCE_TOKENS} or "
                f"more, {budget} are needed; give a longer text as sources.background, or a "
                "shorter length"
            )
        taken: list[str] = []
        place = start
        while budget > 0:
            index = place % len(self.sentences)
            if self.sizes[index] > budget:
                words = self.sentences[index].split(" ")
                # An estimate: whoever takes the sentences measures the result and drops words.
                words = words[: len(words) * budget // self.sizes[index]]
                taken += [" ".join(words)] if words else []
                break
            taken.append(self.sentences[index])
            budget -= self.sizes[index]
            place += 1
        return taken


def read_book(path: Path) -> str:
    """Return a plain text without what Project Gutenberg puts before and after a book.

    Raises:
        DataError: The file cannot be read, or is not UTF-8.
    """
    text = read_text(path)
    book = _BOOK.search(text)
    return book[1] if book else text


def read_background(path: Path, count: Callable[[Sequence[str]], list[int]]) -> Background:
    """Read a plain text's sentences; all white space becomes single blanks.

    Args:
        path: A text file in UTF-8.
        count: Gives the tokens of each of several texts.

    Raises:
        DataError: The file cannot be read, or has no sentence of ten tokens.
    """
    candidates = _END.split(" ".join(read_book(path).split()))
    sizes = count([f" {sentence}" for sentence in candidates])
    kept = [
        (sentence, size)
        for sentence, size in zip(candidates, sizes, strict=True)
        if size >= MIN_SENTENCE_TOKENS
    ]
    if not kept:
        raise DataError(
            f"{path}: no sentence of {MIN_SENTENCE_TOKENS} tokens; give a plain-text book"
        )
    sentences, lengths = zip(*kept, strict=True)
    return Background(sentences, lengths, str(path))
