"""The quickstart's tasks as benchmarks: its rows, its scores, its room for an answer."""

from typing import Any

import pytest

from memdlm.data.tasks import TaskConfig, generate_examples, vocabulary
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import DataError
from memdlm.evaluation.tasks.generated import GENERATED, NAMES
from memdlm.evaluation.tasks.table import expand, find_task
from memdlm.evaluation.tasks.task import TaskRequest, TaskSources, as_lm_eval_task


def build(name: str, length: int = 96, num_samples: int = 40, seed: int = 0) -> Any:
    tokenizer = build_word_tokenizer([" ".join(vocabulary())])
    made = TaskRequest(
        f"generated_{name}@{length}", tokenizer, length, num_samples, seed, TaskSources()
    )
    return as_lm_eval_task(GENERATED[f"generated_{name}"].build(made))


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_room_are_those_of_the_quickstarts_held_out_rows(name: str) -> None:
    rows = [
        row
        for row in generate_examples(TaskConfig(num_examples=200, seed=3, split="test"))
        if row["task"] == name
    ]
    task = build(name, seed=3)
    task.build_all_requests()
    assert [instance.args[0] for instance in task.instances] == [row["prompt"] for row in rows]
    assert [task.doc_to_target(document) for document in task.eval_docs] == [
        row["completion"] for row in rows
    ]
    room = max(len(row["completion"].split()) for row in rows) + 1
    assert task.instances[0].args[1]["max_gen_toks"] == room
    limit = find_task(f"generated_{name}@96")[0].max_new_tokens
    assert room <= max(len(row["completion"]) for row in rows) + 1 <= limit


def test_scores_are_worked_out_by_hand() -> None:
    task = build("multi_value_needle")
    document = task.eval_docs[0]
    first, second = document["answers"]
    name = document["question"].split()[4]
    swapped = f"{second} and {name} adds {first}"
    assert task.process_results(document, [document["completion"]]) == {"score": 1, "recall": 1}
    assert task.process_results(document, [swapped]) == {"score": 1, "recall": 1}
    assert task.process_results(document, [first]) == {"score": 0, "recall": 0.5}
    assert task.process_results(document, [""]) == {"score": 0, "recall": 0}
    assert list(task.aggregation()) == ["score", "recall"]


def test_documents_tell_the_level_of_chance_and_where_the_evidence_stands() -> None:
    document = build("single_needle").eval_docs[0]
    assert document["chance"] == 1 / len(document["candidates"])
    ((start, end),) = document["evidence"]
    assert document["answers"][0] in document["prompt"][start:end]


def test_every_task_builds_at_the_shortest_length_and_at_four_times_the_quickstarts() -> None:
    tasks, groups = expand(["generated@56"])
    assert TaskConfig().tasks == NAMES
    assert tasks == [f"generated_{name}@56" for name in NAMES]
    assert groups == {"generated@56": tasks}
    for name in NAMES:
        assert GENERATED[f"generated_{name}"].num_samples == 40
        for length in (56, 384):
            task = build(name, length, num_samples=5)
            assert len(task.eval_docs) == 5
            words = task.eval_docs[0]["prompt"].split() + task.eval_docs[0]["completion"].split()
            assert length - 4 < len(words) <= length


def test_a_tokenizer_that_cannot_encode_the_task_is_refused() -> None:
    tokenizer = build_word_tokenizer(["amber keeps"])
    made = TaskRequest("generated_single_needle@96", tokenizer, 96, 5, 0, TaskSources())
    with pytest.raises(DataError, match=r"^generated_single_needle@96: the tokenizer does not"):
        GENERATED["generated_single_needle"].build(made)
