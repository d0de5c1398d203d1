"""RULER's tasks as rows of the table: eight of needles, and the three that trace and count."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from memdlm.errors import ConfigError
from memdlm.evaluation.tasks.definitions import with_documents
from memdlm.evaluation.tasks.ruler import (
    common_words,
    frequent_words,
    needles,
    variable_tracking,
)
from memdlm.evaluation.tasks.ruler.fitting import TokenCounter, TooShortError
from memdlm.evaluation.tasks.ruler.haystack import essays_hub, read_essays
from memdlm.evaluation.tasks.ruler.scoring import string_match_all
from memdlm.evaluation.tasks.task import BenchmarkTask, TaskRequest

NUM_SAMPLES = 500
SHORTEST = 256

Document = dict[str, Any]
# Makes the documents of a length, and says how many tokens an answer is granted.
Maker = Callable[[int], tuple[list[Document], int]]
# Prepares what does not depend on the length, and returns what does.
Preparation = Callable[[TaskRequest, TokenCounter], Maker]

# The least length that works is looked for in steps of this many tokens.
_GRAIN = 32


def ruler_documents(request: TaskRequest, prepare: Preparation) -> tuple[list[Document], int]:
    """Make a task's documents.

    Returns:
        Documents of `index`, `input` (text and question), `gen_prefix` (how the answer begins; the
        prompt ends with it), `outputs` (expected answers), `length` (tokens as the task counts
        them, with room for the answer) and `max_length`; and the tokens of an answer, fewer than
        the benchmark's at the shortest lengths.

    Raises:
        ConfigError: The length cannot hold a document with this tokenizer.
        DataError: The tokenizer or the essays cannot be used.
    """
    assert request.length is not None
    make = prepare(request, TokenCounter(request.tokenizer, request.name))
    try:
        return make(request.length)
    except TooShortError as error:
        base = request.name.partition("@")[0]
        least = _least_length(make, request.length + error.excess)
        advice = f"write {base}@{least} or more" if least else "use a longer one"
        raise ConfigError(
            f"task {request.name}: the length cannot hold a document with this tokenizer; {advice}"
        ) from error


def _least_length(make: Maker, start: int) -> int | None:
    """Return a length from `start` on that holds documents; None if there is none nearby."""
    first = -(-start // _GRAIN) * _GRAIN
    for length in range(first, 4 * first, _GRAIN):
        try:
            make(length)
        except TooShortError:
            continue
        return length
    return None


def _needles(form: needles.NeedleForm) -> Preparation:
    def prepare(request: TaskRequest, count: TokenCounter) -> Maker:
        essays = read_essays(request.sources) if form.haystack == "essays" else None
        return lambda length: needles.needle_documents(form, request, length, count, essays)

    return prepare


def _without_data(
    make: Callable[[TaskRequest, int, TokenCounter], tuple[list[Document], int]],
) -> Preparation:
    return lambda request, count: lambda length: make(request, length, count)


def _row(
    prepare: Preparation, max_new_tokens: int, *, delimiter: str = " ", has_essays: bool = False
) -> BenchmarkTask:
    def build(request: TaskRequest) -> dict[str, Any]:
        documents, granted = ruler_documents(request, prepare)
        definition = {
            "output_type": "generate_until",
            "doc_to_text": "{{input}}",
            "doc_to_target": "{{outputs}}",
            "gen_prefix": "{{gen_prefix}}",
            "target_delimiter": delimiter,
            "process_results": _score,
            "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"do_sample": False, "max_gen_toks": granted, "until": []},
            "repeats": 1,
        }
        return with_documents(definition, request.name, documents)

    row = BenchmarkTask(
        build=build,
        metrics=("score",),
        max_new_tokens=max_new_tokens,
        num_samples=NUM_SAMPLES,
        shortest=SHORTEST,
    )
    return replace(row, hub=essays_hub) if has_essays else row


def _score(document: Document, results: list[str]) -> dict[str, float]:
    return {"score": string_match_all(results[0], document["outputs"])}


RULER: dict[str, BenchmarkTask] = {
    name: _row(_needles(form), needles.MAX_NEW_TOKENS, has_essays=form.haystack == "essays")
    for name, form in needles.NEEDLE_FORMS.items()
} | {
    "ruler_vt": _row(
        _without_data(variable_tracking.chain_documents), variable_tracking.MAX_NEW_TOKENS
    ),
    "ruler_cwe": _row(
        _without_data(common_words.list_documents), common_words.MAX_NEW_TOKENS, delimiter="\n\n"
    ),
    "ruler_fwe": _row(_without_data(frequent_words.coded_documents), frequent_words.MAX_NEW_TOKENS),
}
"""RULER's tasks by name."""
