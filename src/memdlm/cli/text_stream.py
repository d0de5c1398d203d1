"""Tokens as text while an answer is on its way. Knows ids and a tokenizer, no model."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from memdlm.answer_text import StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a tokenizer gives for bytes that are no whole character yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Gives out an answer's text piece by piece: no half character, nothing of a stop string."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        write: Callable[[str], None],
        stops: StopStrings | None = None,
    ) -> None:
        """Hand every piece to `write`, up to the first of `stops`."""
        self.tokenizer, self.write = tokenizer, write
        self.stops = stops or StopStrings()
        self._ids: list[int] = []
        self._written = ""

    def add(self, tokens: Sequence[int]) -> None:
        """Take the ids that have become final."""
        if tokens:
            self._ids += tokens
            text = str(self.tokenizer.decode(self._ids, skip_special_tokens=True))
            self._give(self.stops.sure(text.rstrip(_INCOMPLETE)))

    def end(self) -> None:
        """Give out what is left of the answer, and the end of the line."""
        text = self.stops.cut(str(self.tokenizer.decode(self._ids, skip_special_tokens=True)))
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
