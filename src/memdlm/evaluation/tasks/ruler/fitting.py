"""Fit a document to a length: count its tokens, find how much filler it takes, shrink it.

A document's size is its amount of filler (words, sentences, needles). lm-eval tries sizes in fixed
steps, with a new random document for each, and counts them all. Here the same documents are drawn,
so that the generators stand where lm-eval's stand, but only those near the limit are counted.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from memdlm.errors import DataError
from memdlm.evaluation.tasks.definitions import refuse_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

D = TypeVar("D", bound="Draft")

_PANGRAM = "The quick brown fox jumps over the lazy dog."


class Draft(Protocol):
    """A document whose random parts are drawn; its text is written when it is asked for."""

    def text(self) -> str:
        """Return the document as its length is counted."""

    def solved(self) -> str:
        """Return it with its answer, as it is counted in the search for a size."""


class TooShortError(Exception):
    """A length that cannot hold a document; `excess` is how many tokens the least one has more."""

    def __init__(self, excess: int) -> None:
        """Keep the number."""
        super().__init__(f"{excess} tokens too long")
        self.excess = excess


class TokenCounter:
    """Count tokens as lm-eval does, special tokens included.

    Raises:
        DataError: The tokenizer encodes text to nothing; or, when a text is counted, it does not
            know a word of it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", task: str) -> None:
        """Check that the tokenizer counts at all."""
        self._tokenizer, self._task = tokenizer, task
        # Some models open a text with the token that also stands for unknown words.
        opening = set(self._ids(""))
        unknown: Any = tokenizer.unk_token_id
        self._unknown = None if unknown in opening else unknown
        if len(self._ids(_PANGRAM)) <= len(opening):
            raise DataError(
                f"task {task}: the tokenizer encodes text to no tokens; give a model folder that "
                "holds tokenizer files"
            )

    def __call__(self, text: str) -> int:
        """Return the number of tokens of a text."""
        ids = self._ids(text)
        if self._unknown is not None and self._unknown in ids:
            refuse_unknown(self._tokenizer, text, f"task {self._task}")
        return len(ids)

    def _ids(self, text: str) -> list[int]:
        encoded: Any = self._tokenizer(text, verbose=False)
        return list(encoded["input_ids"])


def find_size(
    draw: Callable[[int], Draft],
    count: Callable[[str], int],
    room: int,
    *,
    step: int,
    start: int | None = None,
    most: int | None = None,
) -> int:
    """Return the last size, in steps, whose solved document has at most `room` tokens.

    As lm-eval: where one has exactly `room`, the size is a step more.

    Args:
        draw: Draws a document of a size; called for every size from the start on, in order.
        count: Number of tokens of a text.
        room: Most tokens of a solved document.
        step: Distance of sizes.
        start: First size; `step` if not given.
        most: Greatest size.

    Returns:
        The size; `start` - `step` if the first document is too long.

    Raises:
        DataError: Documents grow and their number of tokens does not.
    """
    size = step if start is None else start
    next_counted = 0.0
    while True:
        draft = draw(size)
        if size >= next_counted:
            tokens = count(draft.solved())
            if tokens > room:
                return size - step
            if tokens == room:
                return size + step if most is None else min(size + step, most)
            # Sizes before this one are taken to be within the limit: they are not counted. A miss
            # would need text of twice the tokens per unit so far, or chance beyond a sixteenth.
            next_counted = size + (room - room // 16 - tokens) * size / (2 * max(tokens, 1))
        if most is not None and size + step > most:
            return most
        if size > 2 * room:
            raise DataError(
                f"the tokenizer counts {tokens} tokens in a document of more than {2 * room} words "
                "or sentences; use one that encodes all of a text"
            )
        size += step


def shrinking(size: int, step: int, least: int = 1) -> list[int]:
    """Return sizes from `size` down: in steps as lm-eval, then one by one to `least`."""
    coarse = range(size, least - 1, -step)
    return [*coarse, *range(coarse[-1] - 1, least - 1, -1)]


def fit(
    draw: Callable[[int], D], count: Callable[[str], int], room: int, sizes: Iterable[int]
) -> tuple[D, int]:
    """Return the first document of at most `room` tokens, and its tokens; each size is drawn anew.

    Raises:
        TooShortError: None of the sizes gives one.
    """
    excess = 0
    for size in sizes:
        draft = draw(size)
        tokens = count(draft.text())
        if tokens <= room:
            return draft, tokens
        excess = tokens - room
    raise TooShortError(excess)
