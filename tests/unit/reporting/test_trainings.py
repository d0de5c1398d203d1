"""Scores over trainings with several seeds, by hand, and which evaluations belong together."""

from pathlib import Path

import pytest

from memdlm.errors import CheckpointError
from memdlm.reporting.blocks import markdown_page
from memdlm.reporting.results import Evaluation, read_evaluation
from memdlm.reporting.trainings import repeated_trainings
from tests.evaluation_folders import write_evaluation

TASK = "ruler_vt@4k"
# Right answers of ten, by training seed.
STANDARD = {0: 9, 1: 7, 2: 8}
TRAIN_ONLY = {0: 10, 1: 6, 2: 9}


def evaluation(folder: Path, seed: int | None, **changes) -> Evaluation:
    def scores(arm: str, task: str, own: int) -> list[float] | None:
        if arm == "train_inference" and seed == 2:
            return None
        right = (STANDARD if arm == "standard" else TRAIN_ONLY)[seed or 0]
        return [1.0] * right + [0.0] * (10 - right)

    values = {"preset": "paper/table1", "title": "Table 1", "num_samples": {TASK: 10}, **changes}
    if seed is not None:
        values["training_seed"] = seed
    place = folder / f"training_seed{seed}"
    return read_evaluation(write_evaluation(place, scores, [TASK], **values), place.name, print)


def test_each_training_is_one_value(tmp_path: Path) -> None:
    (group,) = repeated_trainings([evaluation(tmp_path, seed) for seed in (2, 0, 1)])
    assert [found.training_seed for found in group.evaluations] == [0, 1, 2]
    header, rows = group.table()
    assert header == ["arm", TASK]
    # Means 90, 70, 80: standard deviation 10, over the root of three.
    assert rows[0] == ["Standard MDLM", ("80.0 ± 5.8", "3 trainings", "paper 99.4")]
    # 100, 60, 90; differences +10, -10, +10 by seed: mean 3.3, deviation 11.5.
    assert rows[1][1][:3] == ("83.3 ± 12.0", "3 trainings", "vs first +3.3 ± 6.7")
    # The third training's result is missing: 100, 60; differences +10, -10.
    assert rows[2][1][:3] == ("80.0 ± 20.0", "2 of 3 trainings", "vs first +0.0 ± 10.0")


def test_the_page_says_what_its_errors_are_over(tmp_path: Path) -> None:
    (group,) = repeated_trainings([evaluation(tmp_path, seed) for seed in (0, 1)])
    page = markdown_page("Report", [group.part()], {})
    assert "Table 1: 2 trainings" in page
    assert "Training seeds 0, 1." in page
    assert "one standard error over trainings" in page
    assert "'vs first' is the difference to Standard MDLM" in page
    assert [found.heading for found in group.evaluations][1] == "Table 1, training seed 1"


def test_only_equal_evaluations_of_different_trainings_belong_together(tmp_path: Path) -> None:
    first, second = evaluation(tmp_path / "a", 0), evaluation(tmp_path / "a", 1)
    assert repeated_trainings([first]) == []
    assert repeated_trainings([first, evaluation(tmp_path / "b", None)]) == []
    assert repeated_trainings([first, evaluation(tmp_path / "c", 0)]) == []
    assert repeated_trainings([first, evaluation(tmp_path / "d", 1, seeds=[0, 1])]) == []
    assert repeated_trainings([first, evaluation(tmp_path / "e", 1, title="Table 2")]) == []
    assert len(repeated_trainings([first, second])) == 1


def test_a_seed_that_is_no_number_is_refused(tmp_path: Path) -> None:
    evaluation(tmp_path, 0)
    place = tmp_path / "bad"
    write_evaluation(place, lambda *_: [1.0], [TASK], training_seed="x")
    with pytest.raises(CheckpointError, match="training_seed"):
        read_evaluation(place, "bad", print)
