"""Cells of the main table, by hand: groups, seeds, what was not run, and the paper beside it."""

from math import sqrt
from pathlib import Path

import pytest

from memdlm.reporting.evaluations import main_table
from memdlm.reporting.results import Evaluation, read_evaluation
from memdlm.reporting.scores import Score, columns, score
from tests.evaluation_folders import Scores, arm, cell_path, write_evaluation

GROUP = {"babilong@1k": ["babilong_qa1@1k", "babilong_qa2@1k"]}
TASKS = ["ruler_vt@4k", *GROUP["babilong@1k"]]


def evaluation(folder: Path, scores: Scores, **changes) -> Evaluation:
    values = {"groups": GROUP, "num_samples": dict.fromkeys(TASKS, 4), **changes}
    write_evaluation(folder, scores, values.pop("tasks", TASKS), **values)
    return read_evaluation(folder, "run", print)


def cell(found: Evaluation, name: str, column: str) -> Score:
    wanted = next(each for each in columns(found) if each.name == column)
    return score(found, found.arm(name), wanted)


def test_a_group_stands_in_place_of_its_tasks(tmp_path: Path) -> None:
    found = evaluation(tmp_path, lambda arm, task, seed: [1, 0, 1, 1])
    assert [column.name for column in columns(found)] == ["ruler_vt@4k", "babilong@1k"]
    header, rows = main_table(found)
    assert header == ["arm", "ruler_vt@4k", "babilong@1k"]
    assert rows[0] == ["Standard MDLM", ("75.0 ± 25.0", "n 4"), ("75.0 ± 17.7", "n 8")]


def test_tasks_of_a_group_count_the_same_whatever_their_samples(tmp_path: Path) -> None:
    # Means 1/2 of two and 1/4 of four; variances of the means (1/2)/2 and (1/4)/4.
    scores = {"babilong_qa1@1k": [1, 0], "babilong_qa2@1k": [1, 0, 0, 0], "ruler_vt@4k": [1, 1]}
    found = cell(
        evaluation(tmp_path, lambda arm, task, seed: scores[task], num_samples={}),
        "standard",
        "babilong@1k",
    )
    assert found.estimate is not None
    assert found.estimate.mean == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert found.estimate.standard_error == pytest.approx(sqrt(1 / 4 + 1 / 16) / 2)
    assert (found.num_run, found.is_whole) == (6, True)


def test_several_seeds_give_the_mean_and_error_of_their_means(tmp_path: Path) -> None:
    by_seed = {0: [1, 1, 1, 1], 1: [1, 1, 0, 0], 2: [1, 1, 1, 0]}
    found = evaluation(tmp_path, lambda arm, task, seed: by_seed[seed], seeds=[0, 1, 2])
    lines = cell(found, "standard", "ruler_vt@4k").lines()
    # Means 1, 1/2, 3/4: standard deviation 1/4, over the root of three.
    assert lines == ("75.0 ± 14.4", "n 12, 3 seeds")


def test_what_was_not_run_says_so_and_what_was_in_part_says_how_much(tmp_path: Path) -> None:
    def scores(arm: str, task: str, seed: int) -> list[float] | None:
        if arm == "standard" or (arm == "train_only" and task == "babilong_qa2@1k"):
            return None
        return [1, 0] if task == "ruler_vt@4k" else [1, 0, 1, 1]

    found = evaluation(tmp_path, scores)
    assert cell(found, "standard", "babilong@1k").lines() == ("not run",)
    # A mean over one of two tasks would be the mean of something else.
    assert cell(found, "train_only", "babilong@1k").lines() == ("partly run", "4 of 8 samples")
    assert cell(found, "train_only", "ruler_vt@4k").lines() == ("50.0 ± 50.0", "2 of 4 samples")
    assert cell(found, "train_inference", "babilong@1k").lines() == ("75.0 ± 17.7", "n 8")


def test_a_seed_that_is_not_whole_is_not_averaged_in(tmp_path: Path) -> None:
    def scores(arm: str, task: str, seed: int) -> list[float] | None:
        return None if seed == 1 and task == "babilong_qa2@1k" else [seed] * 4

    found = evaluation(tmp_path, scores, seeds=[0, 1])
    group = cell(found, "standard", "babilong@1k")
    assert group.lines() == ("0.0 ± 0.0", "12 of 16 samples")
    assert not group.is_whole


def test_the_papers_figure_and_the_difference_stand_below(tmp_path: Path) -> None:
    found = evaluation(tmp_path, lambda arm, task, seed: [1, 0, 1, 1], preset="paper/table1")
    lines = cell(found, "train_only", "ruler_vt@4k").lines()
    assert lines == ("75.0 ± 25.0", "n 4", "paper 99.52", "diff -24.5")
    cell_path(tmp_path, "train_only", "ruler_vt@4k").unlink()
    again = read_evaluation(tmp_path, "run", print)
    assert cell(again, "train_only", "ruler_vt@4k").lines() == ("not run", "paper 99.52")


def test_a_figure_that_the_evaluation_names_comes_first(tmp_path: Path) -> None:
    paper = {"train_only": {"ruler_vt@4k": 70.25}}
    found = evaluation(
        tmp_path, lambda arm, task, seed: [1, 0, 1, 1], preset="paper/table1", paper=paper
    )
    assert cell(found, "train_only", "ruler_vt@4k").lines()[2:] == ("paper 70.25", "diff +4.8")


def test_an_evaluation_may_know_which_backbone_its_model_is(tmp_path: Path) -> None:
    paper = {"train_only": {"ruler_vt@4k": 88.56}, "standard": {"ruler_vt@4k": 99.4}}
    found = evaluation(tmp_path, lambda arm, task, seed: [1, 1], preset="paper/table1", paper=paper)
    figures = [cell(found, name, "ruler_vt@4k").paper for name in ("train_only", "standard")]
    assert [f.backbone for f in figures if f] == ["LLaDA2.1-mini", "LLaDA-MoE-7B-A1B-Base"]


def test_an_arm_without_a_model_is_a_row_that_was_not_run(tmp_path: Path) -> None:
    arms = [arm("standard"), {**arm("train_only"), "model": None}]
    found = evaluation(
        tmp_path, lambda arm, task, seed: [1, 1] if arm == "standard" else None, arms=arms
    )
    assert main_table(found)[1][1] == ["train_only", ("not run",), ("not run",)]
