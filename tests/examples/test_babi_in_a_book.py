"""The bAbI-in-a-book example on small files in the real formats."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from memdlm.quickstart.start import CHECKPOINT

SCRIPT = Path(__file__).parents[2] / "examples" / "babi_in_a_book.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("babi_in_a_book", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["babi_in_a_book"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


babi = load_script()

STORY = (
    "1 Mary moved to the bathroom.\n"
    "2 John went to the hallway.\n"
    "3 Where is Mary? \tbathroom\t1\n"
    "4 Mary travelled to the office.\n"
    "5 Where is Mary? |office|4\n"
    "1 Sandra went to the garden.\n"
    "2 Where is Sandra? \tgarden\t1\n"
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "babi"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"qa1_single-supporting-fact_{split}.txt").write_text(STORY)
    early = "".join(f"The early page number {w} was long. " for w in "abcdefgh")
    late = "".join(f"A late leaf of sort {w} came next! " for w in "xy")
    (tmp_path / "book.txt").write_text(early + late)
    return tmp_path


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["babi_in_a_book.py", *arguments])
    return int(babi.main())


def build(sources: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    places = ["--babi", str(sources / "babi"), "--book", str(sources / "book.txt")]
    output = ["--output", str(sources / "set"), "--words", "60", "--copies", "2"]
    return run("build", *places, *output, *more, monkeypatch=monkeypatch)


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_facts_are_hidden_in_order_and_splits_share_no_page(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build(sources, monkeypatch) == 0
    train, test = (read_rows(sources / "set" / f"{name}.jsonl") for name in ("train", "test"))
    assert len(train) == 6
    assert [row["completion"] for row in test] == ["bathroom", "office", "garden"]
    for row in (*train, *test):
        assert len(f"{row['prompt']} {row['completion']}".split()) <= 60
    second = test[1]["prompt"]
    places = [
        "to the bathroom .",
        "to the hallway .",
        "to the office .",
        "question : where is mary ?",
    ]
    assert sorted(places, key=second.index) == places
    assert all("early page" in row["prompt"] and "late leaf" not in row["prompt"] for row in train)
    assert all("late leaf" in row["prompt"] and "early page" not in row["prompt"] for row in test)


def test_a_set_is_not_overwritten_by_accident(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(sources, monkeypatch) == 0
    before = (sources / "set" / "train.jsonl").read_bytes()
    assert build(sources, monkeypatch, "--seed", "1") == 2
    assert "already holds a set" in capsys.readouterr().err
    assert (sources / "set" / "train.jsonl").read_bytes() == before
    assert build(sources, monkeypatch, "--seed", "1", "--overwrite") == 0
    assert (sources / "set" / "train.jsonl").read_bytes() != before


def test_a_malformed_line_is_named(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sources / "babi" / "qa1_single-supporting-fact_train.txt"
    path.write_text(STORY + "Mary has no number.\n")
    assert build(sources, monkeypatch) == 1
    error = capsys.readouterr().err
    assert f"{path} line 8: not in bAbI's format" in error
    assert not (sources / "set" / "train.jsonl").exists()


@pytest.mark.parametrize("memory", ["on", "off"])
def test_evaluate_prints_one_json_line(
    memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = "amber keeps ba la fa . question : what does amber keep ? answer : amber keeps"
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"prompt": prompt, "completion": "ba la fa"}) + "\n")
    arguments = ("evaluate", "--model", str(CHECKPOINT), "--data", str(data), "--memory", memory)
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["rows"] == 1
    assert figures["memory"] == memory
    assert figures["accuracy"] in (0.0, 1.0)
