"""The five BABILong tasks of the paper, qa1 to qa5: their rows in the table of tasks."""

from collections.abc import Callable
from typing import Any

from memdlm.data.readers import read_records
from memdlm.errors import DataError
from memdlm.evaluation.tasks.babilong.scoring import LABELS, only_label
from memdlm.evaluation.tasks.definitions import check_known, read_definition, with_documents
from memdlm.evaluation.tasks.task import (
    BenchmarkTask,
    TaskRequest,
    TaskSources,
    as_lm_eval_task,
    length_label,
)

HUB = "RMT-team/babilong-1k-samples"
HUB_LENGTHS = (0, *(1024 << power for power in range(8)))
"""Lengths that the hub holds for qa1 to qa5: 0k, 1k, 2k, ... 128k."""

MAX_NEW_TOKENS = 16
NUM_SAMPLES = 100
"""The paper's: its cells are whole multiples of 0.2 over five tasks."""


def build(request: TaskRequest, task: str) -> dict[str, Any]:
    """Make lm-eval's task of BABILong's `qa1` to `qa5`.

    On the hub, documents are the first `num_samples`, whatever the seed, and have the length they
    have (the hub's label counts facts and background by another tokenizer). From local files they
    are made to fit the length; see `memdlm.evaluation.tasks.babilong.local`.

    Raises:
        DataError: Data is missing, unreadable or too short; the hub lacks the length or cannot be
            reached; or the tokenizer does not know a word.
    """
    definition = _definition(task)
    lm_eval_score = definition["process_results"]

    def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
        strict = only_label(document["target"], results[0], document["question"], LABELS[task])
        return {**lm_eval_score(document, results), "strict": float(strict)}

    definition["process_results"] = process_results
    definition["metric_list"] = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("acc", "strict")
    ]
    definition["generation_kwargs"] |= {"max_gen_toks": MAX_NEW_TOKENS}
    write_prompt = prompt_writer(task)
    if request.sources.babi is None:
        documents = _read_hub(request, task)
    else:
        # Lazy: it needs torch, and the table of tasks is read by commands that do not.
        from memdlm.evaluation.tasks.babilong.local import make_documents

        documents = make_documents(request, task, MAX_NEW_TOKENS, write_prompt)
    check_known(request, [f"{write_prompt(row)} {row['target']}" for row in documents])
    return with_documents(definition, request.name, documents)


def _read_hub(request: TaskRequest, task: str) -> list[dict[str, Any]]:
    if request.sources.background is not None:
        raise DataError(
            f"{request.name}: sources.background is used with bAbI files only; give sources.babi "
            "too, or neither"
        )
    if request.length not in HUB_LENGTHS:
        lengths = ", ".join(map(length_label, HUB_LENGTHS))
        raise DataError(
            f"{request.name}: the hub has {lengths}; use one of them, or give sources.babi and "
            "sources.background for any length"
        )
    source = f"{HUB}:{length_label(request.length)}:{task}"
    try:
        records = read_records(source, request.num_samples)
    except DataError as error:
        raise DataError(
            f"{request.name}: {error}; or give sources.babi and sources.background"
        ) from error
    return [
        {key: record.values[key] for key in ("input", "question", "target")} for record in records
    ]


def prompt_writer(task: str) -> Callable[[dict[str, Any]], str]:
    """Return lm-eval's own way from a document of `qa1` to `qa5` to the whole prompt.

    A document has `input`, `question` and `target`.
    """
    blank = {"input": "", "question": "", "target": ""}
    made = as_lm_eval_task(with_documents(_definition(task), f"babilong_{task}", [blank]))

    def write_prompt(document: dict[str, Any]) -> str:
        return str(made.fewshot_context(document, num_fewshot=made.config.num_fewshot))

    return write_prompt


def _definition(task: str) -> dict[str, Any]:
    definition = read_definition("babilong", f"babilong_{task}")
    definition.pop("metadata", None)
    return definition


def _hub(sources: TaskSources) -> str | None:
    return f"{HUB} (BABILong)" if sources.babi is None else None


def _row(task: str) -> BenchmarkTask:
    return BenchmarkTask(
        build=lambda request: build(request, task),
        metrics=("acc", "strict"),
        max_new_tokens=MAX_NEW_TOKENS,
        num_samples=NUM_SAMPLES,
        shortest=0,
        hub=_hub,
    )


BABILONG = {f"babilong_{task}": _row(task) for task in LABELS}
