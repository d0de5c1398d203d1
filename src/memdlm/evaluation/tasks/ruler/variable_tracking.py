"""RULER's variable tracking: a chain of assignments in noise; which variables have the value?

Hsieh et al., arXiv 2404.06654, section 3 (multi-hop tracing): one chain of four hops. Before the
document comes a solved example, sized for 500 tokens, its names drawn anew for each document.

Where lm-eval can make documents these are the same. A length that cannot hold that example and a
document (about 1024 tokens and less, by the tokenizer) has one of half the length at most, and a
length that cannot hold that either has none; lm-eval does not return then.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memdlm.evaluation.tasks.ruler.draws import Draws
from memdlm.evaluation.tasks.ruler.fitting import (
    TokenCounter,
    TooShortError,
    find_size,
    fit,
    shrinking,
)
from memdlm.evaluation.tasks.ruler.haystack import NOISE
from memdlm.evaluation.tasks.task import TaskRequest

MAX_NEW_TOKENS = 30

_QUESTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
# "assgined" is the benchmark's.
_ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assgined the value {value}, they are: "
)

_NUM_NAMES = 5
_STEP = 10
_EXAMPLE_LENGTH = 500
_EXAMPLE_STEP = 5
# Few lines of noise are cut into sentences, for there to be places enough.
_SENTENCES = [f"{part}." for part in NOISE.removesuffix(".").split(".")] + ["\n"]


@dataclass(frozen=True)
class ChainDraft:
    """A drawn document: the chain's names and number, and its places among lines of noise."""

    names: list[str]
    value: int
    num_noises: int
    places: list[int]

    def question(self) -> str:
        """Return the document with its question."""
        first, *others = self.names
        chain = [f"VAR {first} = {self.value}"]
        chain += [
            f"VAR {name} = VAR {before} "
            for before, name in zip(self.names[:-1], others, strict=True)
        ]
        lines = _noise(self.num_noises)
        for moved, (place, statement) in enumerate(zip(self.places, chain, strict=True)):
            lines.insert(place + moved, statement)
        context = " ".join(lines).replace(". \n", ".\n")
        return _QUESTION.format(context=context, value=self.value)

    def answer_beginning(self) -> str:
        """Return the words that an answer begins with."""
        return _ANSWER.format(count=_NUM_NAMES, value=self.value)

    def text(self) -> str:
        """Return the question and the beginning of its answer."""
        return self.question() + self.answer_beginning()

    def solved(self) -> str:
        """Return it with the names, written as Python writes a list, as lm-eval counts it."""
        return f"{self.text()} {self.names}"


@dataclass(frozen=True)
class _Example:
    """The solved example, and the names to replace in it."""

    text: str
    names: list[str]

    def renamed(self, draws: Draws) -> str:
        text = self.text
        for name in self.names:
            text = text.replace(name, _draw_name(draws, len(name)))
        return text + "\n\n"


def chain_documents(
    request: TaskRequest, length: int, count: TokenCounter
) -> tuple[list[dict[str, Any]], int]:
    """Return the documents of the task, and the tokens of an answer.

    Args:
        request: Number of documents and seed.
        length: Tokens of example, document and answer, at most.
        count: Counts tokens.

    Raises:
        TooShortError: The length holds no document even without an example.
    """
    for longest, example_step, step in (
        (_EXAMPLE_LENGTH, _EXAMPLE_STEP, _STEP),
        (length // 2, 1, 1),
    ):
        draws = Draws.of(request.seed)
        try:
            example = _draw_example(draws, longest, count, example_step)
        except TooShortError:
            continue
        room = length - MAX_NEW_TOKENS - count(example.text)
        size = find_size(_drawer(draws, 5), count, room, step=step)
        # One step of reserve: a document may come out longer than the one that was measured.
        if size >= max(step, 2):
            sizes = shrinking(size, step)
            return _documents(request, length, count, draws, example, sizes), MAX_NEW_TOKENS
    draws = Draws.of(request.seed)
    size = find_size(_drawer(draws, 5), count, length - MAX_NEW_TOKENS, step=1)
    sizes = shrinking(max(size, 1), 1)
    return _documents(request, length, count, draws, None, sizes), MAX_NEW_TOKENS


def _documents(
    request: TaskRequest,
    length: int,
    count: TokenCounter,
    draws: Draws,
    example: _Example | None,
    sizes: list[int],
) -> list[dict[str, Any]]:
    reserved = MAX_NEW_TOKENS + (count(example.text) if example else 0)
    documents = []
    for index in range(request.num_samples):
        draft, tokens = fit(_drawer(draws, 5), count, length - reserved, sizes)
        before = example.renamed(draws) if example else ""
        documents.append(
            {
                "index": index,
                "input": before + draft.question(),
                "outputs": draft.names,
                "gen_prefix": draft.answer_beginning().strip(),
                "length": tokens + reserved,
                "max_length": length,
            }
        )
    return documents


def _draw_example(draws: Draws, longest: int, count: TokenCounter, step: int) -> _Example:
    draw = _drawer(draws, 3)
    size = find_size(draw, count, longest - MAX_NEW_TOKENS, step=step)
    draft, _ = fit(draw, count, longest - MAX_NEW_TOKENS, shrinking(max(size, step - 1, 1), step))
    return _Example(f"{draft.text()} {' '.join(draft.names)}\n\n", draft.names)


def _drawer(draws: Draws, name_length: int) -> Callable[[int], ChainDraft]:
    def draw(num_noises: int) -> ChainDraft:
        names: list[str] = []
        # lm-eval fails where a name comes twice; here the next one takes its place.
        while len(names) < _NUM_NAMES:
            if (name := _draw_name(draws, name_length)) not in names:
                names.append(name)
        value = int(draws.numpy.randint(10000, 99999))
        places = draws.python.sample(range(len(_noise(num_noises))), _NUM_NAMES)
        return ChainDraft(names, value, num_noises, sorted(places))

    return draw


def _draw_name(draws: Draws, length: int) -> str:
    return "".join(draws.python.choices(string.ascii_uppercase, k=length))


def _noise(num_noises: int) -> list[str]:
    if num_noises > _NUM_NAMES:
        return [NOISE + "\n"] * num_noises
    return _SENTENCES * num_noises
