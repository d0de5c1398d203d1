"""Folders of results: what is read, what is left out, and what is refused with file and fix."""

from pathlib import Path
from typing import Any

import pytest

from memdlm.errors import CheckpointError
from memdlm.reporting.results import Evaluation, read_evaluation
from tests.evaluation_folders import COMMIT, cell_path, change, write_evaluation

TASKS = ["ruler_vt@4k", "longbench_trec"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_evaluation(tmp_path / "run", lambda arm, task, seed: [1, 0, 1, 1], TASKS)


def read(folder: Path, remarks: list[str] | None = None) -> Evaluation:
    return read_evaluation(folder, "run", (remarks if remarks is not None else []).append)


def test_every_result_is_read_with_where_it_comes_from(folder: Path) -> None:
    evaluation = read(folder)
    assert len(evaluation.results) == 3 * 2
    result = evaluation.results["train_only", "ruler_vt@4k", 0]
    assert result.path == "results/train_only/ruler_vt@4k/seed0.json"
    assert (result.commit, result.metric, result.scores()) == (COMMIT, "score", [1, 0, 1, 1])
    assert result.model == "inclusionAI/LLaDA-MoE-7B-A1B-Base + runs/train_only/adapter"
    assert len(result.digest) == 64
    assert evaluation.arm("train_inference").has_memory
    assert not evaluation.arm("standard").has_memory


def test_what_was_not_run_is_missing_and_what_is_unfinished_is_not_seen(folder: Path) -> None:
    cell_path(folder, "standard", "ruler_vt@4k").unlink()
    partial = cell_path(folder, "standard", "ruler_vt@4k").with_name(".seed0.json.partial")
    partial.write_text('{"format": 1, "ar')
    remarks: list[str] = []
    assert ("standard", "ruler_vt@4k", 0) not in read(folder, remarks).results
    assert remarks == []


@pytest.mark.parametrize(
    ("name", "task", "seed"),
    [("other", "ruler_vt@4k", 0), ("standard", "ruler_vt@8k", 0), ("standard", "ruler_vt@4k", 7)],
)
def test_a_result_of_another_evaluation_is_left_out_with_a_word(
    folder: Path, name: str, task: str, seed: int
) -> None:
    source = cell_path(folder, "standard", "ruler_vt@4k")
    stranger = cell_path(folder, name, task, seed)
    stranger.parent.mkdir(parents=True, exist_ok=True)
    stranger.write_bytes(source.read_bytes())
    change(stranger, arm=name, task=task, seed=seed)
    remarks: list[str] = []
    evaluation = read(folder, remarks)
    assert (name, task, seed) not in evaluation.results
    assert evaluation.strangers == [stranger.relative_to(folder).as_posix()]
    assert remarks == [f"{stranger} is no part of {folder / 'evaluation.json'} and is left out"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_text(path.read_text()[:-40]), "is damaged or cut off"),
        (lambda path: path.write_bytes(b"\xff\xfe{}"), "is damaged or cut off"),
        (lambda path: path.write_text("[]"), "is no mapping"),
        (lambda path: change(path, format=2), "is of another format"),
        (lambda path: change(path, arm="standard"), "its place is that of train_only/"),
        (lambda path: change(path, seed=3), "its place is that of train_only/"),
        (lambda path: change(path, seed=True), "seed is missing or of the wrong kind"),
        (lambda path: change(path, metrics={}), "metrics is empty"),
        (lambda path: change(path, metrics={"score": 1}), "metrics.score is missing or of the"),
        (lambda path: change(path, samples=[]), "samples is empty"),
        (lambda path: change(path, samples=[3]), "samples[0] is no mapping"),
        (lambda path: change(path, settings=None), "settings is missing"),
        (lambda path: spoil_sample(path, score=float("nan")), "score is nan, which is no result"),
        (lambda path: spoil_sample(path, score="1"), "score is missing or of the wrong kind"),
        (lambda path: spoil_sample(path), "samples[0].metrics.score is missing"),
    ],
)
def test_a_damaged_result_is_one_line_with_file_and_fix(folder: Path, spoil, message: str) -> None:
    path = cell_path(folder, "train_only", "ruler_vt@4k")
    spoil(path)
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    text = str(caught.value)
    assert message in text
    assert str(path) in text
    assert text.endswith(": delete it and evaluate again, which makes only what is missing")
    assert "\n" not in text


def spoil_sample(path: Path, **metrics: Any) -> None:
    sample = {"id": 0, "prompt_sha256": "x", "metrics": metrics}
    change(path, samples=[sample])


def test_a_sample_that_is_there_twice_is_refused(folder: Path) -> None:
    path = cell_path(folder, "standard", "ruler_vt@4k")
    change(path, samples=[{"id": 0, "prompt_sha256": "x", "metrics": {"score": 1}}] * 2)
    with pytest.raises(CheckpointError, match="samples has an id twice"):
        read(folder)


@pytest.mark.parametrize("changes", [{"arms": 3}, {"tasks": None}, {"arms": [{"label": "x"}]}])
def test_a_damaged_description_is_named(folder: Path, changes: dict[str, Any]) -> None:
    change(folder / "evaluation.json", **changes)
    with pytest.raises(CheckpointError, match=r"evaluation\.json: .*leave this one out"):
        read(folder)


def test_the_main_metric_is_the_score_or_the_first(folder: Path) -> None:
    path = cell_path(folder, "standard", "ruler_vt@4k")
    figure = {"value": 0.5, "stderr": None, "num_samples": 2}
    samples = [
        {"id": n, "prompt_sha256": "x", "metrics": {"recall": n, "exact": 0}} for n in range(2)
    ]
    change(path, metrics={"recall": figure, "exact": {**figure, "value": 0}}, samples=samples)
    result = read(folder).results["standard", "ruler_vt@4k", 0]
    assert result.metrics == ("recall", "exact")
    assert result.scores() == [0, 1]
    assert result.scores("exact") == [0, 0]
    assert result.has_own_mean
    change(path, metrics__recall__value=0.6)
    assert not read(folder).results["standard", "ruler_vt@4k", 0].has_own_mean
