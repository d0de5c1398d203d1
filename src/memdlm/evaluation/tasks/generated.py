"""The quickstart's generated tasks, asked and scored through the same path as the benchmarks.

Documents are the held-out rows that the quickstart evaluates on: the same ones, with its seed and
40 per task. `score` is an exact answer, `recall` the share of the expected values that it holds.
"""

from typing import Any

from memdlm.evaluation.tasks.definitions import check_known, test_split
from memdlm.evaluation.tasks.task import BenchmarkTask, TaskRequest

# Written out, as `memdlm.data.tasks` needs torch and the table of tasks is read without it.
NAMES = (
    "single_needle",
    "multi_value_needle",
    "variable_tracking",
    "common_words",
    "two_fact_story",
)

METRICS = ("score", "recall")
SHORTEST = 56
"""Words that every task's facts, question and answer fit into."""

MAX_NEW_TOKENS = 64
"""At least the characters of any answer, so that no tokenizer needs more."""

NUM_SAMPLES = 40
"""The quickstart's: 200 rows over five tasks."""


def build(request: TaskRequest, name: str) -> dict[str, Any]:
    """Make lm-eval's task of one generated task at `request.length` words.

    An answer has room for the longest expected one and the end-of-text token, as in the quickstart.
    Each document holds, besides the example, `chance`: what blind choice among the values present
    would score.

    Raises:
        ConfigError: The length cannot hold the task's facts.
        DataError: The tokenizer does not know a word.
    """
    from memdlm.data.tasks import chance_level, score_text

    def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
        score = score_text(document, results[0])  # type: ignore[arg-type]
        return {"score": float(score.exact), "recall": score.recall}

    documents = [
        # Through lists, as JSON has them: that is how lm-eval gives documents back.
        {
            **example,
            "evidence": [list(span) for span in example["evidence"]],
            "chance": chance_level(example),
        }
        for example in examples(request, name)
    ]
    check_known(request, [f"{row['prompt']} {row['completion']}" for row in documents])
    encoded: Any = request.tokenizer(
        [str(document["completion"]) for document in documents], add_special_tokens=False
    )
    room = max(len(ids) for ids in encoded["input_ids"]) + 1
    return {
        "task": request.name,
        "output_type": "generate_until",
        "test_split": "test",
        "custom_dataset": test_split(documents),
        "doc_to_text": "prompt",
        "doc_to_target": "completion",
        "process_results": process_results,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in METRICS
        ],
        "generation_kwargs": {
            "max_gen_toks": room,
            "do_sample": False,
            "temperature": 0.0,
            "until": [],
        },
        "num_fewshot": 0,
    }


def examples(request: TaskRequest, name: str) -> list[Any]:
    """Return the held-out examples of one task; all tasks in turn, as the quickstart draws them."""
    from memdlm.data.tasks import TaskConfig, generate_examples

    config = TaskConfig(
        tasks=NAMES,
        length=request.length or SHORTEST,
        num_examples=len(NAMES) * request.num_samples,
        seed=request.seed,
        split="test",
    )
    return [example for example in generate_examples(config) if example["task"] == name]


def _row(name: str) -> BenchmarkTask:
    return BenchmarkTask(
        build=lambda request: build(request, name),
        metrics=METRICS,
        max_new_tokens=MAX_NEW_TOKENS,
        num_samples=NUM_SAMPLES,
        shortest=SHORTEST,
        unit="words",
    )


GENERATED = {f"generated_{name}": _row(name) for name in NAMES}
