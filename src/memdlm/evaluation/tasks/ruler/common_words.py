"""RULER's common words: a numbered list in which ten words come more often than the others.

Hsieh et al., arXiv 2404.06654, section 3 (aggregation). lm-eval leaves room for a solved example,
which its prompts do not contain. Where it can make documents these are the same. For a length that
has no such room (about 1024 tokens and less, by the tokenizer; lm-eval writes an empty list then)
none is left, and the list is as long as the length allows. Where even ten common words are too many
(about 320 tokens and less), five are asked for, in half the tokens of an answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memdlm.evaluation.tasks.ruler.draws import Draws
from memdlm.evaluation.tasks.ruler.fitting import TokenCounter, find_size, fit, shrinking
from memdlm.evaluation.tasks.ruler.words import list_words
from memdlm.evaluation.tasks.task import TaskRequest

MAX_NEW_TOKENS = 120

_QUESTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the {num_common} "
    "most common words in the above list?"
)
_ANSWER = " Answer: The top {num_common} words that appear most often in the list are:"

_STEP = 10


@dataclass(frozen=True)
class _Form:
    """How often a common word comes and how often another, in the list and in the example.

    `example_words` is how many words the example has that lm-eval leaves room for; 0 is no example.
    """

    repeats: tuple[int, int]
    step: int
    example_words: int = 0
    example_repeats: tuple[int, int] = (0, 0)
    num_common: int = 10

    @property
    def max_new_tokens(self) -> int:
        """Tokens of an answer: 12 for each word."""
        return MAX_NEW_TOKENS * self.num_common // 10

    @property
    def least(self) -> int:
        """Words of the shortest list."""
        # Ten words would all be common; in steps of ten lm-eval begins with them all the same.
        return self.num_common if self.step == _STEP else self.num_common + 1


_LONG = _Form((30, 3), _STEP, example_words=40, example_repeats=(10, 3))
_SHORT = _Form((6, 1), _STEP, example_words=20, example_repeats=(3, 1))
_TIGHT = (_Form((6, 1), 1), _Form((3, 1), 1), _Form((3, 1), 1, num_common=5))


@dataclass(frozen=True)
class ListDraft:
    """A drawn document: its words in order, the common ones, and the example's text."""

    words: list[str]
    common: list[str]
    example: "ListDraft | None"

    def question(self) -> str:
        """Return the list with its question."""
        return _QUESTION.format(context=_numbered(self.words), num_common=len(self.common))

    def answer_beginning(self) -> str:
        """Return the words that an answer begins with."""
        return _ANSWER.format(num_common=len(self.common))

    def text(self) -> str:
        """Return the list, the question and the beginning of its answer."""
        return self.question() + self.answer_beginning()

    def solved(self) -> str:
        """Return it with the words, after the solved example."""
        text = f"{self.text()} {_numbered(self.common)}"
        if self.example is None:
            return text
        return f"{self.example.text()}{_numbered(self.example.common)}\n{text}"


def list_documents(
    request: TaskRequest, length: int, count: TokenCounter
) -> tuple[list[dict[str, Any]], int]:
    """Return the documents of the task, and the tokens of an answer.

    Args:
        request: Number of documents and seed.
        length: Tokens of document and answer, at most.
        count: Counts tokens.

    Raises:
        TooShortError: The length holds not even a list of six words, five of them three times.
    """
    for form in (_SHORT if length < 4096 else _LONG, *_TIGHT):
        draws = Draws.of(request.seed)
        words = list(list_words())
        draws.order.shuffle(words)
        draw = _drawer(draws, words, form)
        room = length - form.max_new_tokens
        size = find_size(draw, count, room, step=form.step, start=form.least, most=len(words))
        if size >= form.least:
            break
    sizes = shrinking(max(size, form.least), form.step, form.least)
    documents = []
    for index in range(request.num_samples):
        draft, tokens = fit(draw, count, room, sizes)
        documents.append(
            {
                "index": index,
                "input": draft.question(),
                "outputs": draft.common,
                "gen_prefix": draft.answer_beginning().strip(),
                "length": tokens + form.max_new_tokens,
                "max_length": length,
            }
        )
    return documents, form.max_new_tokens


def _drawer(draws: Draws, words: Sequence[str], form: _Form) -> Callable[[int], ListDraft]:
    def draw_list(
        num_words: int, repeats: tuple[int, int], example: ListDraft | None = None
    ) -> ListDraft:
        chosen = draws.python.sample(words, num_words)
        common, others = chosen[: form.num_common], chosen[form.num_common :]
        every = common * repeats[0] + others * repeats[1]
        draws.order.shuffle(every)
        return ListDraft(every, common, example)

    def draw(num_words: int) -> ListDraft:
        if form.example_words == 0:
            return draw_list(num_words, form.repeats)
        example = draw_list(form.example_words, form.example_repeats)
        return draw_list(num_words, form.repeats, example)

    return draw


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
