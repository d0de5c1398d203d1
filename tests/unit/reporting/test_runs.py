"""Metrics files: what is read, what is left out, what is refused; and figures from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from memdlm.errors import CheckpointError
from memdlm.reporting.runs import Run, read_metrics

LINE = {"step": 1, "loss": 2.0}


def write(folder: Path, text: str) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text(text)
    return path


def run(*records: dict[str, Any]) -> Run:
    return Run("a", {}, records, is_complete=True)


def test_lines_are_read_in_order_without_their_texts(tmp_path: Path) -> None:
    lines = [LINE, {"step": 2, "eval_loss": 3.0, "note": "x", "flag": True}]
    path = write(tmp_path, "".join(json.dumps(line) + "\n" for line in lines))
    remarks: list[str] = []
    assert read_metrics(path, remarks.append) == [LINE, {"step": 2, "eval_loss": 3.0}]
    assert remarks == []


def test_a_last_line_that_was_cut_off_is_left_out_and_told(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(LINE) + '\n{"step": 2, "lo')
    remarks: list[str] = []
    assert read_metrics(path, remarks.append) == [LINE]
    assert len(remarks) == 1
    assert "metrics.jsonl:2 was cut off" in remarks[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{oops\n{"step": 2, "loss": 1}\n', r"metrics.jsonl:1 is no log line"),
        ('{"step": 1, "loss": 1}\n[1]\n', r"metrics.jsonl:2 is no log line"),
        ('{"loss": 1}\n', r"metrics.jsonl:1 is no log line"),
        ('{"step": "x"}\n', r"metrics.jsonl:1 is no log line"),
        ("", "holds no training loss yet"),
        ('{"step": 1, "eval_loss": 1}\n', "holds no training loss yet"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_metrics(write(tmp_path, text), lambda line: None)


def test_a_missing_or_unreadable_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl", lambda line: None)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="is not UTF-8 text"):
        read_metrics(path, lambda line: None)


def test_the_time_of_a_step_leaves_out_evaluations_and_is_a_median() -> None:
    measured = run(
        {"step": 10, "loss": 1.0, "time": 100.0},
        {"step": 20, "loss": 1.0, "time": 105.0},  # 0.5 s a step
        {"step": 20, "eval_loss": 1.0, "time": 205.0},
        {"step": 30, "loss": 1.0, "time": 210.0},  # 0.5, though an evaluation of 100 s came before
        {"step": 40, "loss": 1.0, "time": 3810.0},  # resumed an hour later
        {"step": 40, "train_runtime": 9.0, "time": 3811.0},
    )
    assert measured.seconds_per_step() == 0.5
    assert run(LINE, {"step": 2, "loss": 1.0}).seconds_per_step() is None


def test_series_and_last_values_skip_lines_without_the_metric() -> None:
    logged = run(LINE, {"step": 1, "eval_nll": 5.0}, {"step": 2, "loss": 1.0})
    assert logged.series("loss") == ([1, 2], [2.0, 1.0])
    assert logged.last("eval_nll") == 5.0
    assert logged.last("nll") is None
    assert logged.tokens_per_second() is None
    assert logged.num_steps == 2
