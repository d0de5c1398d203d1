"""The BABILong example on small files in the real formats, and what an evaluation then asks."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from memdlm.data.encoding import encode_prompt
from memdlm.data.tokenizer import build_word_tokenizer, check_encodable
from memdlm.evaluation.retrieval_probe.asking import make_items
from memdlm.evaluation.samples import encode_samples, read_samples
from memdlm.evaluation.tasks.babilong import BABILONG
from memdlm.evaluation.tasks.babilong.scoring import LABELS, only_label
from memdlm.evaluation.tasks.task import TaskRequest, TaskSources, as_lm_eval_task

SCRIPT = Path(__file__).parents[2] / "examples" / "babilong.py"

STORIES = {
    "qa1_single-supporting-fact": "1 {0} moved to the bathroom.\n2 Where is {0}? \tbathroom\t1\n",
    "qa2_two-supporting-facts": (
        "1 {0} got the milk there.\n2 {0} went to the hallway.\n"
        "3 Where is the milk? \thallway\t1 2\n"
    ),
    "qa3_three-supporting-facts": (
        "1 {0} got the milk.\n2 {0} went to the office.\n3 {0} went to the garden.\n"
        "4 Where was the milk before the garden? \toffice\t1 3 2\n"
    ),
    "qa4_two-arg-relations": (
        "1 The hallway is east of the bathroom.\n2 The bedroom is west of the bathroom.\n"
        "3 What is the bathroom east of?\tbedroom\t2\n"
    ),
    "qa5_three-arg-relations": "1 {0} gave the milk to Jeff.\n2 Who gave the milk? \t{0}\t1\n",
}
PARAGRAPH = "On the {0} page number {1} the old clock of the tower had stopped long ago."


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("babilong_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_script()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "babi"
    folder.mkdir()
    for name, story in STORIES.items():
        # The training file's last story is the one that is held out.
        train = story.format("Mary") * 19 + story.format("Fred")
        (folder / f"{name}_train.txt").write_text(train)
        (folder / f"{name}_test.txt").write_text(story.format("Bill") * 3)
    pages = [PARAGRAPH.format("early", page) for page in range(102)]
    pages += [PARAGRAPH.format("late", page) for page in range(102, 127)]
    licence = "Nobody may read this licence text of far more than ten words at all."
    book = "\n\n".join([f"{licence}\n*** START OF THIS BOOK X ***", *pages])
    (tmp_path / "book.txt").write_text(f"{book}\n\n*** END OF THIS BOOK X ***\n{licence}\n")
    return tmp_path


def run(sources: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    places = ["--babi", str(sources / "babi"), "--book", str(sources / "book.txt")]
    output = ["--output", str(sources / "set"), "--lengths", "256", "320", "--rows", "50"]
    monkeypatch.setattr(sys, "argv", ["babilong.py", *places, *output, *more])
    return int(example.main())


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluated(sources: Path, task: str, tokenizer: Any) -> Any:
    """The task as `memdlm eval` builds it from these files, which refuses words it lacks."""
    places = TaskSources(str(sources / "babi"), str(sources / "set" / "book_test.txt"))
    name = f"babilong_{task}"
    made = BABILONG[name].build(TaskRequest(f"{name}@320", tokenizer, 320, 5, 0, places))
    return as_lm_eval_task(made)


def test_rows_are_the_evaluations_prompts_of_other_stories_and_pages(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(sources, monkeypatch) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 5
    assert captured.err == ""
    train, held_out = (read_rows(sources / "set" / f"{name}.jsonl") for name in ("train", "eval"))
    assert (len(train), len(held_out)) == (5 * 2 * 19, 5 * 2 * 1)
    words = read_rows(sources / "set" / "words.jsonl")[0]["words"]
    tokenizer = build_word_tokenizer([], extra_words=[words])
    longest = 0
    for row in (*train, *held_out):
        check_encodable(tokenizer, f"{row['prompt']} {row['completion']}")
        size = len(encode_prompt(tokenizer, row["prompt"], chat_template="never")) + 16
        longest = max(longest, size)
        assert "early page" in row["prompt"]
        assert "late page" not in row["prompt"]
    assert 410 <= longest <= 416  # qa3's, 96 above the others'
    assert not any("Bill moved" in row["prompt"] for row in train)
    for task in LABELS:
        asked = evaluated(sources, task, tokenizer)
        asked.build_all_requests()
        prompts = [instance.args[0] for instance in asked.instances]
        assert all("late page" in text and "early page" not in text for text in prompts)
        # lm-eval's description and examples, to the letter.
        head = prompts[0][: prompts[0].rindex("\n\n")]
        assert sum(row["prompt"].startswith(head) for row in train) == 2 * 19


def test_completions_are_right_by_the_benchmarks_stricter_comparison(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(sources, monkeypatch) == 0
    seen = {row["completion"] for row in read_rows(sources / "set" / "train.jsonl")}
    assert seen == {
        "The most recent location of Mary is bathroom.",
        "The milk is in the hallway.",
        "Before the garden the milk was in the office.",
        "bedroom",
        "Mary",
    }
    for task, question, target in (
        ("qa1", "Where is Mary?", "bathroom"),
        ("qa2", "Where is the milk?", "hallway"),
        ("qa3", "Where was the milk before the garden?", "office"),
    ):
        answer = example.write_answer(task, question, target)
        assert only_label(target, answer, question, LABELS[task])


def test_the_last_stories_are_held_out_of_training(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(sources, monkeypatch) == 0
    train, held_out = (read_rows(sources / "set" / f"{name}.jsonl") for name in ("train", "eval"))
    assert not any("Fred moved" in row["prompt"] for row in train)
    moved = [row for row in held_out if " moved to the bathroom." in row["prompt"]]
    assert len([row for row in moved if "Fred moved" in row["prompt"]]) == 2


def test_held_out_rows_name_what_the_probe_asks_for(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(sources, monkeypatch, "--tasks", "qa2", "qa3") == 0
    held_out = str(sources / "set" / "eval.jsonl")
    words = read_rows(sources / "set" / "words.jsonl")[0]["words"]
    tokenizer = build_word_tokenizer([], extra_words=[words])
    samples = read_samples(held_out, (), None, seed=0)
    milk = "Fred got the milk there.", "Fred went to the hallway."
    office = "Fred got the milk.", "Fred went to the garden.", "Fred went to the office."
    assert {sample.evidence for sample in samples} == {milk, office}
    assert {sample.answers for sample in samples} == {("hallway",), ("office",)}
    encoded = encode_samples(samples, tokenizer, chat_template="never")
    items = make_items(
        samples, encoded, tokenizer, chat_template="never", needs_question=True, seed=0
    )
    for item in items:
        found = tokenizer.decode(item.prompt[item.needle])
        assert all(fact in found for fact in item.sample.evidence)
    for sample in samples:
        assert sample.question is not None
        assert "page" in sample.dialogue.prompt and "page" not in sample.question
        assert all(fact not in sample.question for fact in sample.evidence)


def test_a_model_of_some_tasks_can_read_all(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(sources, monkeypatch, "--tasks", "qa4") == 0
    assert len(read_rows(sources / "set" / "train.jsonl")) == 2 * 19
    words = read_rows(sources / "set" / "words.jsonl")[0]["words"]
    for task in LABELS:
        evaluated(sources, task, build_word_tokenizer([words]))


def test_rows_can_be_measured_by_a_models_own_tokenizer(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(sources, monkeypatch) == 0
    rows = (sources / "set" / "train.jsonl").read_bytes()
    words = read_rows(sources / "set" / "words.jsonl")[0]["words"]
    build_word_tokenizer([words]).save_pretrained(sources / "model")
    options = ("--overwrite", "--tokenizer", str(sources / "model"))
    assert run(sources, monkeypatch, *options) == 0
    assert (sources / "set" / "train.jsonl").read_bytes() == rows


def test_a_set_is_not_overwritten_by_accident(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(sources, monkeypatch) == 0
    before = (sources / "set" / "train.jsonl").read_bytes()
    capsys.readouterr()
    assert run(sources, monkeypatch, "--seed", "1") == 2
    error = capsys.readouterr().err
    assert "already holds a set" in error
    assert error.count("\n") == 1
    assert (sources / "set" / "train.jsonl").read_bytes() == before
    assert run(sources, monkeypatch, "--seed", "1", "--overwrite") == 0
    assert (sources / "set" / "train.jsonl").read_bytes() != before


def test_what_cannot_be_used_is_one_line(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*more: str) -> str:
        assert run(sources, monkeypatch, *more) == 1
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        assert not (sources / "set" / "train.jsonl").exists()
        return text

    assert "use a longer length" in error("--lengths", "100")
    path = sources / "babi" / "qa1_single-supporting-fact_test.txt"
    path.write_text("1 Mary moved.\n2 Who is Mary? \tbathroom\t1\n")
    assert "qa1: 'Who is Mary?' is no question of this task" in error()
    path.unlink()
    assert "no qa1_*_test.txt; give the folder" in error()
    (sources / "book.txt").write_text("One paragraph only, of more than a few words. " * 50)
    assert "no blank line in its last fifth" in error()
