"""Tokens as text while an answer is on its way. Knows ids and a tokenizer, no model."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from memdlm.answer_text import AnswerText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """Gives out an answer's text piece by piece: no half character, nothing of a stop string."""

    def __init__(self, reading: AnswerText, write: Callable[[str], None]) -> None:
        """Hand every piece to `write`."""
        self.reading, self.write = reading, write
        self._ids: list[int] = []
        self._written = ""

    def add(self, tokens: Sequence[int]) -> None:
        """Take the ids that have become final."""
        if tokens:
            self._ids += tokens
            self._give(self.reading.read_begun(self._ids))

    def end(self) -> None:
        """Give out what is left of the answer, and the end of the line."""
        text = self.reading.read(self._ids)
        if not text.startswith(self._written):
            # A tokenizer that changes earlier text as later tokens come: say it all once more.
            self.write("\n")
            self._written = ""
        self._give(text)
        self.write("\n")

    def _give(self, text: str) -> None:
        if len(text) > len(self._written) and text.startswith(self._written):
            self.write(text[len(self._written) :])
            self._written = text


def piece(tokenizer: "PreTrainedTokenizerBase", left: int | None, tokens: Sequence[int]) -> str:
    """Return the text of `tokens` as it reads behind the token `left`, its space included."""
    alone = str(tokenizer.decode(list(tokens)))
    if left is None:
        return alone
    before, both = str(tokenizer.decode([left])), str(tokenizer.decode([left, *tokens]))
    return both[len(before) :] if both.startswith(before) else alone
