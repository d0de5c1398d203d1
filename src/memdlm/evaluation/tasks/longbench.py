"""LongBench (Bai et al., arXiv 2308.14508): the paper's twelve sets, through lm-eval's definitions.

Prompts, metrics and lengths of answers come from lm-eval's YAML files. Documents come from the hub
copy that lm-eval names, or from the benchmark's own JSON Lines files (`trec.jsonl`, ...). What the
hub copy calls `question` is `input` there; everything else has the same name. Their questions of
trec, triviaqa and samsum end in `Type:`, `Answer:` and `Summary:`, and their contexts are bare; the
hub copy was made by others, and whether its texts are the same was not checked here.

Prompts beyond the model's context lose their middle, as in the benchmark's own code.
"""

from pathlib import Path
from typing import Any

from memdlm.data.readers import Record, read_records
from memdlm.errors import DataError
from memdlm.evaluation.tasks.definitions import read_definition, with_documents
from memdlm.evaluation.tasks.task import BenchmarkTask, TaskRequest, TaskSources

HUB = "Xnhyacinth/LongBench"

SETS: dict[str, tuple[int, int]] = {
    "triviaqa": (32, 200),
    "passage_retrieval_en": (32, 200),
    "passage_retrieval_zh": (32, 200),
    "multifieldqa_en": (64, 150),
    "multifieldqa_zh": (64, 200),
    "2wikimqa": (32, 200),
    "dureader": (128, 200),
    "multi_news": (512, 200),
    "trec": (64, 200),
    "samsum": (128, 200),
    "lcc": (64, 500),
    "repobench-p": (64, 500),
}
"""The paper's sets: tokens of an answer, and documents, as the benchmark counts both."""

NATIVE_METRICS = {
    "qa_f1_score": ("triviaqa", "multifieldqa_en", "2wikimqa"),
    "qa_f1_zh_score": ("multifieldqa_zh",),
    "retrieval_score": ("passage_retrieval_en",),
    "retrieval_zh_score": ("passage_retrieval_zh",),
    "rouge_score": ("multi_news", "samsum"),
    "rouge_zh_score": ("dureader",),
    "classification_score": ("trec",),
    "code_sim_score": ("lcc", "repobench-p"),
}
"""What lm-eval's `score` is for a set; it is reported under this name too."""


def build(request: TaskRequest, name: str) -> dict[str, Any]:
    """Make lm-eval's task of one set, over its first `num_samples` documents.

    Raises:
        DataError: The file is missing or no such file, or the hub cannot be reached.
        UsageError: lm-eval, or a package its metrics need, is not installed.
    """
    definition = read_definition("longbench", name)
    definition.pop("metadata", None)
    return with_documents(definition, request.name, _documents(request, name))


def _documents(request: TaskRequest, name: str) -> list[dict[str, Any]]:
    folder = request.sources.longbench
    if folder is None:
        source = f"{HUB}:{name}:test"
        try:
            records = read_records(source, request.num_samples)
        except DataError as error:
            raise DataError(
                f"{request.name}: {error}; or give sources.longbench, a folder with {name}.jsonl"
            ) from error
        return [_document(record, "question") for record in records]
    path = Path(folder).expanduser() / f"{name}.jsonl"
    if not path.is_file():
        raise DataError(
            f"{request.name}: {path} does not exist; sources.longbench is the folder of "
            "LongBench's JSON Lines files (data.zip on its hub page)"
        )
    records = read_records(str(path), request.num_samples)
    return [_document(record, "input") for record in records]


def _document(record: Record, question: str) -> dict[str, Any]:
    """Return the fields that prompts and metrics read, under the hub copy's names.

    Raises:
        DataError: A field is missing or of another type.
    """
    # A set without classes has null there (official) or an empty list.
    values = record.values | {"all_classes": record.values.get("all_classes") or []}
    for field in ("context", question):
        if not isinstance(values.get(field), str):
            raise DataError(f"{record.where}: no text {field!r}; is this a file of LongBench's?")
    for field in ("answers", "all_classes"):
        entries = values.get(field)
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise DataError(f"{record.where}: {field!r} is no list of texts; is this LongBench's?")
    if not values["answers"]:
        raise DataError(
            f"{record.where}: no answer to compare with; is this a file of LongBench's?"
        )
    return {
        "context": values["context"],
        "question": values[question],
        "answers": list(values["answers"]),
        "all_classes": list(values["all_classes"]),
    }


def _hub(sources: TaskSources) -> str | None:
    return f"{HUB} (LongBench)" if sources.longbench is None else None


def _row(name: str) -> BenchmarkTask:
    max_new_tokens, num_samples = SETS[name]
    (native,) = [metric for metric, names in NATIVE_METRICS.items() if name in names]
    return BenchmarkTask(
        build=lambda request: build(request, name),
        metrics=("score", native),
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        hub=_hub,
        truncation="middle",
    )


LONGBENCH = {f"longbench_{name}": _row(name) for name in SETS}
