"""RULER's needles in a haystack: hidden sentences that give a key's number or identifier.

Hsieh et al., arXiv 2404.06654, section 3 (retrieval). The document counts towards a length, and the
128 tokens of an answer, but not the beginning of the answer that the prompt ends with: up to some
dozens of tokens more reach the model. Essays are taken in steps of 500 words, so that a length of
less than about 1024 tokens hides its needles in a handful of words. Both are lm-eval's ways. Where
a length cannot hold the needles beside 128 tokens (several at about 320 and less), an answer has 64
or 40: an identifier or four numbers, written digit by digit.
"""

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memdlm.errors import DataError
from memdlm.evaluation.tasks.ruler.draws import ORDER_SEED, Draws
from memdlm.evaluation.tasks.ruler.fitting import (
    TokenCounter,
    TooShortError,
    find_size,
    fit,
    shrinking,
)
from memdlm.evaluation.tasks.ruler.haystack import NOISE, Essays
from memdlm.evaluation.tasks.ruler.words import needle_words
from memdlm.evaluation.tasks.task import TaskRequest

MAX_NEW_TOKENS = 128
_TIGHT_NEW_TOKENS = (64, 40)

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for "
    "{query} mentioned in the provided text?"
)
_SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} "
    "for {query} mentioned in the provided text?"
)
_BEGINNING = "The special magic {kind} for {query} mentioned in the provided text {verb}"

# Forty places in a text, in percent.
_DEPTHS = [round(100 * i / 39) for i in range(40)]


@dataclass(frozen=True)
class NeedleForm:
    """What a task hides, and in what.

    Attributes:
        haystack: `noise`, `essays` or `needles`.
        keys: What a needle is found by, `words` or `uuids`.
        values: What it gives, `numbers` or `uuids`.
        num_keys: Keys that are hidden.
        num_values: Needles of each key.
        num_queries: Keys that are asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def num_needles(self) -> int:
        """Needles that are hidden."""
        return self.num_keys * self.num_values

    @property
    def is_single(self) -> bool:
        """Whether one value is asked for."""
        return self.num_queries * self.num_values == 1

    def step(self, length: int) -> int:
        """Return in what steps lm-eval tries the haystack: words of essays, else sentences."""
        if self.haystack == "essays":
            return 500
        return 5 if length < 4096 else 25


NEEDLE_FORMS: dict[str, NeedleForm] = {
    "niah_single_1": NeedleForm("noise"),
    "niah_single_2": NeedleForm("essays"),
    "niah_single_3": NeedleForm("essays", values="uuids"),
    "niah_multikey_1": NeedleForm("essays", num_keys=4),
    "niah_multikey_2": NeedleForm("needles"),
    "niah_multikey_3": NeedleForm("needles", keys="uuids", values="uuids"),
    "niah_multivalue": NeedleForm("essays", num_values=4),
    "niah_multiquery": NeedleForm("essays", num_keys=4, num_queries=4),
}


@dataclass(frozen=True)
class NeedleDraft:
    """A drawn document."""

    form: NeedleForm
    context: Callable[[], str]
    query: str
    answers: list[str]

    @property
    def kind(self) -> str:
        """What is asked for: `number` or `numbers`."""
        return self.form.values.removesuffix("s") if self.form.is_single else self.form.values

    def text(self) -> str:
        """Return the document with its question."""
        template = _ONE if self.form.is_single else _SEVERAL
        return template.format(kind=self.kind, context=self.context(), query=self.query)

    def solved(self) -> str:
        """Return it with the values that are asked for."""
        return self.text() + " ".join(self.answers)

    def beginning(self) -> str:
        """Return the words that an answer begins with."""
        verb = "is" if self.form.is_single else "are"
        return _BEGINNING.format(kind=self.kind, query=self.query, verb=verb)


def needle_documents(
    form: NeedleForm, request: TaskRequest, length: int, count: TokenCounter, essays: Essays | None
) -> tuple[list[dict[str, Any]], int]:
    """Return the documents of a task, and the tokens of an answer.

    Args:
        form: The task's.
        request: Number of documents and seed.
        length: Tokens of document and answer, at most.
        count: Counts tokens.
        essays: The text, where the form wants one.

    Raises:
        DataError: The essays are too short for the length.
        TooShortError: The length holds not even the needles.
    """
    for max_new_tokens in (MAX_NEW_TOKENS, *_TIGHT_NEW_TOKENS):
        try:
            documents = _documents(form, request, length, count, essays, max_new_tokens)
        except TooShortError as error:
            too_short = error
        else:
            return documents, max_new_tokens
    raise too_short


def _documents(
    form: NeedleForm,
    request: TaskRequest,
    length: int,
    count: TokenCounter,
    essays: Essays | None,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    draws, step = Draws.of(request.seed), form.step(length)

    def draw(size: int) -> NeedleDraft:
        # A step beyond the end takes all there is; another would have nothing to add.
        if essays is not None and size > len(essays.words) + step:
            raise DataError(
                f"task {request.name}: {essays.source} has {len(essays.words)} words, which do not "
                "fill the length; give a longer text as sources.essays, or a shorter length"
            )
        return _draw(form, size, draws, essays)

    room = length - max_new_tokens
    size = find_size(draw, count, room, step=step)
    sizes = shrinking(max(size, form.num_needles), step)
    documents = []
    for index in range(request.num_samples):
        draft, tokens = fit(draw, count, room, sizes)
        documents.append(
            {
                "index": index,
                "input": draft.text(),
                "outputs": draft.answers,
                "gen_prefix": draft.beginning(),
                "length": tokens + max_new_tokens,
                "max_length": length,
            }
        )
    return documents


def _draw(form: NeedleForm, size: int, draws: Draws, essays: Essays | None) -> NeedleDraft:
    rng = draws.python
    keys, values = [], []
    for _ in range(form.num_keys):
        keys.append(_draw_entry(form.keys, rng))
        values.append([_draw_entry(form.values, rng) for _ in range(form.num_values)])
    needles = [
        _NEEDLE.format(kind=form.values, key=key, value=value)
        for key, its_values in zip(keys, values, strict=True)
        for value in its_values
    ]
    random.Random(ORDER_SEED).shuffle(needles)
    if essays is not None:
        depths = sorted(rng.sample(_DEPTHS, len(needles)))
        context = _among_sentences(essays, size, needles, depths)
    else:
        context = _among_lines(_lines(form, size, rng), needles, rng)
    asked = rng.sample(range(form.num_keys), form.num_queries)
    names = [keys[i] for i in asked]
    query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
    return NeedleDraft(form, context, query, [value for i in asked for value in values[i]])


def _draw_entry(kind: str, rng: random.Random) -> str:
    if kind == "words":
        return rng.choice(needle_words())
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _lines(form: NeedleForm, size: int, rng: random.Random) -> list[str]:
    if form.haystack == "noise":
        return [NOISE] * size
    # The arguments are drawn in the order in which they stand.
    return [
        _NEEDLE.format(
            kind=form.values, key=_draw_entry(form.keys, rng), value=_draw_entry(form.values, rng)
        )
        for _ in range(size)
    ]


def _among_lines(lines: list[str], needles: list[str], rng: random.Random) -> Callable[[], str]:
    # From the end, so that what is inserted moves no later place.
    places = sorted(rng.sample(range(len(lines)), len(needles)), reverse=True)
    for place, needle in zip(places, needles, strict=True):
        lines.insert(place, needle)
    return lambda: "\n".join(lines)


def _among_sentences(
    essays: Essays, num_words: int, needles: list[str], depths: Sequence[int]
) -> Callable[[], str]:
    def write() -> str:
        sentences = essays.sentences(num_words)
        parts, start = [], 0
        for needle, depth in zip(needles, depths, strict=True):
            place = int(len(sentences) * (depth / 100))
            parts += [" ".join(sentences[start:place]), needle]
            start = place
        return " ".join([*parts, " ".join(sentences[start:])])

    return write
