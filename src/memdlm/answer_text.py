"""What an answer's tokens say, and the strings that end it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memdlm.errors import UsageError
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.end_of_text import IsComplete

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a tokenizer gives for bytes that are no whole character yet.
_INCOMPLETE = "\ufffd"
# Of " 've" and " 're", from which `clean_up_tokenization_spaces` takes the space, all but one.
_LONGEST_CLEAN_UP = 3


@dataclass(frozen=True)
class StopStrings:
    """Strings before the first of which a text is cut.

    Attributes:
        strings: None of them is empty.
    """

    strings: tuple[str, ...] = ()

    def cut(self, text: str) -> str:
        """Return the text up to the first stop string."""
        return text[: self._first(text)]

    def is_settled(self, text: str) -> bool:
        """Return whether `cut` gives the same for every text that begins with `text`.

        That is when it holds a stop string and no other one that begins before it is about to
        follow: of "b" and "abc", the second one begins first if "ab" goes on.
        """
        first = self._first(text)
        return first < len(text) and first <= self._begun(text)

    def sure(self, text: str) -> str:
        """Return the beginning of `text` that `cut` leaves, however the text goes on."""
        return text[: min(self._first(text), self._begun(text))]

    def _first(self, text: str) -> int:
        places = [place for stop in self.strings if (place := text.find(stop)) >= 0]
        return min(places, default=len(text))

    def _begun(self, text: str) -> int:
        """Return the first place where a stop string begins that the text may go on to complete."""
        places = [
            start
            for stop in self.strings
            for start in range(max(0, len(text) - len(stop) + 1), len(text))
            if stop.startswith(text[start:])
        ]
        return min(places, default=len(text))


@dataclass(frozen=True)
class AnswerText:
    """How answers are read.

    Attributes:
        tokenizer: The model's.
        stops: What ends an answer besides the tokens that do.
    """

    tokenizer: "PreTrainedTokenizerBase"
    stops: StopStrings

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        stop_strings: Sequence[str],
        sampling: SamplingConfig,
    ) -> "AnswerText":
        """Check the stop strings.

        Raises:
            UsageError: One is empty, or there are some for `sampling.infill`.
        """
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise UsageError(f"stop_strings={stop_strings!r}: give a list, and no empty string")
        if stop_strings and sampling.infill:
            raise UsageError("stop_strings end answers, but sampling.infill fills gaps: choose one")
        return cls(tokenizer, StopStrings(tuple(stop_strings)))

    def read(self, tokens: list[int]) -> str:
        """Return the text of an answer, cut and without special tokens."""
        return self.stops.cut(self._decode(tokens))

    def read_begun(self, tokens: list[int]) -> str:
        """Return the beginning of an answer's text that no further token takes away."""
        return self.stops.sure(self._settled(tokens))

    @property
    def is_complete(self) -> IsComplete | None:
        """What a decode is to ask; None without stop strings."""
        return self._is_complete if self.stops.strings else None

    def _is_complete(self, row: int, tokens: list[int]) -> bool:
        return self.stops.is_settled(self._settled(tokens))

    def _settled(self, tokens: list[int]) -> str:
        # What may change at the end: a character of which bytes are missing, and spaces that are
        # taken out before what follows.
        text = self._decode(tokens).rstrip(_INCOMPLETE)
        if getattr(self.tokenizer, "clean_up_tokenization_spaces", False):
            text = text[:-_LONGEST_CLEAN_UP]
        return text

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
