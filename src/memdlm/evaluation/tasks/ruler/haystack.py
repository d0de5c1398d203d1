"""What needles are hidden in: one text over and over, essays, or other needles."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from memdlm.data.babi import read_text
from memdlm.data.readers import read_records
from memdlm.errors import DataError, UsageError
from memdlm.evaluation.tasks.task import TaskSources

ESSAYS = "baber/paul_graham_essays"
_PUNKT = "punkt_tab"

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""What is repeated where nothing but the needle matters."""


class Essays:
    """A text, to be taken from its beginning in any number of words, cut into sentences."""

    def __init__(self, text: str, split: Callable[[str], Sequence[str]], source: str) -> None:
        """Keep the words.

        Raises:
            DataError: There are none.
        """
        # As lm-eval counts words: white space at either end leaves an empty one there.
        self.words = re.sub(r"\s+", " ", text).split(" ")
        self.source = source
        if not any(self.words):
            raise DataError(f"{source} holds no text; give one as sources.essays")
        self._split = split
        self._last: tuple[int, Sequence[str]] = (0, ())

    def sentences(self, num_words: int) -> Sequence[str]:
        """Return the sentences of the first words; a cut sentence counts as one."""
        # A task's documents have nearly all the same size, and cutting a long text takes seconds.
        if self._last[0] != num_words:
            self._last = (num_words, self._split(" ".join(self.words[:num_words]).strip()))
        return self._last[1]


def read_essays(sources: TaskSources) -> Essays:
    """Read the essays that the sources name; white space, line breaks included, becomes blanks.

    Raises:
        DataError: The text or what splits it cannot be read or fetched, or it is empty.
        UsageError: The extra `eval` is not installed.
    """
    split = split_simply if sources.sentences == "simple" else _punkt()
    if sources.essays is not None:
        return Essays(read_text(Path(sources.essays).expanduser()), split, sources.essays)
    try:
        texts = [record.values["text"] for record in read_records(ESSAYS)]
    except DataError as error:
        raise DataError(f"{error}; or give a text of your own as sources.essays") from error
    return Essays(" ".join(texts), split, ESSAYS)


def essays_hub(sources: TaskSources) -> str | None:
    """Say what would be fetched for the essays; None if all of it is here."""
    wanted = [f"{ESSAYS} (RULER)"] if sources.essays is None else []
    if sources.sentences == "punkt" and not _has_punkt():
        wanted.append(f"nltk's {_PUNKT} (RULER)")
    return " and ".join(wanted) or None


def split_simply(text: str) -> list[str]:
    """Cut a text after each word that ends with `.`, `?` or `!`."""
    sentences: list[list[str]] = [[]]
    for word in text.split():
        sentences[-1].append(word)
        if word[-1] in ".?!":
            sentences.append([])
    return [" ".join(words) for words in sentences if words]


def _has_punkt() -> bool:
    try:
        import nltk

        nltk.data.find(f"tokenizers/{_PUNKT}")
    except (ImportError, LookupError):
        return False
    return True


def _punkt() -> Callable[[str], Sequence[str]]:
    try:
        import nltk
    except ImportError as error:
        raise UsageError("RULER needs the extra `eval`: pip install 'memdlm[eval]'") from error

    # It reports a failure on the stream and as its result.
    if not _has_punkt() and not nltk.download(_PUNKT, quiet=True, print_error_to=io.StringIO()):
        raise DataError(
            f"nltk's {_PUNKT}, which splits RULER's essays into sentences, is not here and cannot "
            f"be downloaded: run `python -m nltk.downloader {_PUNKT}` with network, or set "
            "sources.sentences=simple (then prompts are not lm-eval's)"
        )
    split: Callable[[str], Sequence[str]] = nltk.sent_tokenize
    return split
