"""LongBench: every set builds and scores without a network, with lm-eval's prompts."""

import json
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager

from memdlm.errors import DataError, UsageError
from memdlm.evaluation.tasks import definitions
from memdlm.evaluation.tasks.longbench import LONGBENCH, SETS
from memdlm.evaluation.tasks.table import expand, find_task
from memdlm.evaluation.tasks.task import TaskRequest, TaskSources, as_lm_eval_task

# Set -> the right answers, an answer, and its score worked out by hand.
SCORED: dict[str, tuple[list[str], str, float]] = {
    # Words in common 2, of 4 given and 2 expected (articles do not count): 2 * 2 / (4 + 2).
    "triviaqa": (["The Eiffel Tower"], "Eiffel Tower in Paris", 2 / 3),
    "passage_retrieval_en": (["Paragraph 7"], "Paragraph 7 or 9", 1 / 2),
    "passage_retrieval_zh": (["段落7"], "段落7", 1.0),
    # The better of two answers counts.
    "multifieldqa_en": (["deep blue", "blue"], " Blue.", 1.0),
    "multifieldqa_zh": (["北京"], "北京上海", 2 / 3),
    "2wikimqa": (["Paris"], "Paris, France", 2 / 3),
    "dureader": (["北京"], "北京上海", 2 / 3),
    # The longest common sequence is 2 words, of 4 given and 2 expected.
    "multi_news": (["storm hits"], "storm hits coast today", 2 / 3),
    "trec": (["Location"], "Location or Number", 1 / 2),
    "samsum": (["Amanda bakes cookies"], "Nobody sleeps", 0.0),
    # The first line that is no comment: 11 of 12 letters in common, as a whole percentage.
    "lcc": (["return a + b"], "# a comment\nreturn a + c\nreturn a + b", 0.92),
    "repobench-p": (["return a + b"], "\nreturn a + b", 1.0),
}


def official_row(name: str, number: int = 0) -> dict[str, Any]:
    return {
        "input": f"What is asked {number}?",
        "context": f"Context {number} \u2028 of {name}.",
        "answers": SCORED[name][0],
        "length": 7,
        "dataset": name,
        "language": "en",
        "all_classes": ["Number", "Location"] if name == "trec" else None,
        "_id": f"{name}{number}",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in SETS:
        rows = [official_row(name, number) for number in range(3)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def request(name: str, folder: Path | None, num_samples: int = 100) -> TaskRequest:
    # These tasks draw nothing and measure nothing, so that no tokenizer is needed.
    tokenizer: Any = None
    sources = TaskSources(longbench=None if folder is None else str(folder))
    return TaskRequest(f"longbench_{name}", tokenizer, None, num_samples, 0, sources)


def build(made: TaskRequest) -> Any:
    return as_lm_eval_task(LONGBENCH[made.name].build(made))


def fails(made: TaskRequest) -> str:
    with pytest.raises(DataError) as caught:
        build(made)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(SETS))
def test_every_set_builds_from_the_official_files_and_scores(name: str, folder: Path) -> None:
    task = build(request(name, folder, num_samples=2))
    task.build_all_requests()
    assert len(task.instances) == 2
    prompt, generation = task.instances[1].args
    assert "Context 1 \u2028 of" in prompt
    # multi_news and lcc have no question.
    assert ("What is asked 1?" in prompt) == (name not in ("multi_news", "lcc"))
    row, _ = find_task(f"longbench_{name}")
    assert generation["max_gen_toks"] == row.max_new_tokens
    assert row.truncation == "middle"
    _, answer, score = SCORED[name]
    metrics = task.process_results(task.eval_docs[0], [answer])
    assert list(metrics) == list(row.metrics)
    assert metrics["score"] == pytest.approx(score, abs=1e-6)


def test_prompts_and_generation_are_those_of_lm_evals_own_tasks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(lm_eval.tasks.__file__).parent / "longbench"
    manager = TaskManager(include_path=str(own), include_defaults=False)
    for name in SETS:
        ours = build(request(name, folder))
        hub_rows = datasets.Dataset.from_list(list(ours.eval_docs))

        def load_dataset(
            path: str,
            name: str,
            expected: str = name,
            rows: datasets.Dataset = hub_rows,
            **_: Any,
        ) -> Any:
            assert (path, name) == ("Xnhyacinth/LongBench", expected)
            return {"test": rows}

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        theirs = manager.load(f"longbench_{name}")["tasks"][f"longbench_{name}"]
        ours.build_all_requests()
        theirs.build_all_requests()
        assert [i.args for i in ours.instances] == [i.args for i in theirs.instances]


def test_the_hub_copy_is_read_under_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "context": "Some examples.",
            "question": "How far is it?",
            "answers": ["Number"],
            "all_classes": ["Number"],
            "answer_prefix": "Type:",
        }
    ]
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = build(request("trec", None))
    assert asked == [(("Xnhyacinth/LongBench", "trec"), {"split": "test"})]
    assert task.doc_to_text(task.eval_docs[0]).endswith("Some examples.\nHow far is it?")


def test_missing_and_foreign_files_are_one_line_that_names_the_fix(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    (folder / "lcc.jsonl").unlink()
    assert "lcc.jsonl does not exist; sources.longbench is the folder" in fails(
        request("lcc", folder)
    )
    path = folder / "trec.jsonl"
    foreign = {"context": None, "answers": [1], "all_classes": "x"}
    for field, value in foreign.items():
        path.write_text(json.dumps(official_row("trec") | {field: value}))
        assert f"trec.jsonl:1: {field!r}" in fails(request("trec", folder)).replace("no text ", "")
    path.write_text(json.dumps(official_row("trec") | {"answers": []}))
    assert "no answer to compare with" in fails(request("trec", folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = fails(request("trec", None))
    assert "the hub cannot be reached" in message
    assert message.endswith("or give sources.longbench, a folder with trec.jsonl")


def test_a_definition_that_lm_eval_lacks_and_a_missing_package_name_the_fix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match=r"no_such_set\.yaml: pip install --upgrade 'memdlm\[eva"):
        definitions.read_definition("longbench", "no_such_set")

    def import_module(name: str) -> Any:
        raise ImportError("no module named jieba")

    monkeypatch.setattr(definitions, "import_module", import_module)
    with pytest.raises(UsageError, match=r"no module named jieba.*pip install"):
        definitions.read_definition("longbench", "trec")


def test_the_group_holds_the_papers_twelve_sets() -> None:
    tasks, groups = expand(["longbench"])
    assert tasks == [f"longbench_{name}" for name in SETS]
    assert len(tasks) == 12
    assert groups == {"longbench": tasks}
    row, length = find_task("longbench_multi_news")
    assert (row.max_new_tokens, row.num_samples, length) == (512, 200, None)
    assert "Xnhyacinth/LongBench" in str(row.hub(TaskSources()))
    assert row.hub(TaskSources(longbench="folder")) is None
