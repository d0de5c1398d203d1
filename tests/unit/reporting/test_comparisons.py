"""Paired tests between arms: which pairs, on which samples, and when there is no pairing."""

from pathlib import Path

import pytest

from memdlm.reporting.comparisons import compare, compared_pairs, p_text
from memdlm.reporting.results import Evaluation, read_evaluation
from memdlm.reporting.scores import columns
from memdlm.uncertainty import exact_sign_test, sign_flip_test
from tests.evaluation_folders import Scores, arm, cell_path, change, write_evaluation

GROUP = {"babilong@1k": ["babilong_qa1@1k", "babilong_qa2@1k"]}


def evaluation(folder: Path, scores: Scores, tasks: list[str], **changes) -> Evaluation:
    write_evaluation(folder, scores, tasks, **changes)
    return read_evaluation(folder, "run", print)


def names(found: Evaluation) -> list[tuple[str, str]]:
    return [(first.name, second.name) for first, second in compared_pairs(found)]


def test_few_arms_are_all_compared_with_each_other(tmp_path: Path) -> None:
    found = evaluation(tmp_path, lambda arm, task, seed: [1], ["ruler_vt@4k"])
    assert names(found) == [
        ("train_only", "standard"),
        ("train_inference", "standard"),
        ("train_inference", "train_only"),
    ]


def test_variants_are_compared_with_the_default_and_with_their_own_training(tmp_path: Path) -> None:
    variants = ["standard_mdlm", "2", "2__train_only", "3", "3__train_only"]
    arms = [arm(name) for name in variants]
    found = evaluation(
        tmp_path,
        lambda arm, task, seed: [1],
        ["babilong_qa1@1k"],
        arms=arms,
        preset="ablations/steps",
    )
    assert names(found) == [
        ("standard_mdlm", "2"),
        ("2", "2__train_only"),
        ("3", "2"),
        ("3", "3__train_only"),
        ("3__train_only", "2__train_only"),
    ]


def test_right_and_wrong_answers_of_a_group_get_the_exact_test(tmp_path: Path) -> None:
    answers = {"train_only": [1, 1, 1, 1, 0, 1], "standard": [0, 0, 1, 0, 1, 0]}
    found = evaluation(
        tmp_path,
        lambda arm, task, seed: answers.get(arm),
        GROUP["babilong@1k"],
        groups=GROUP,
    )
    (column,) = columns(found)
    test = compare(found, column, found.arm("train_only"), found.arm("standard"))
    assert test.test is not None
    assert test.test.p_value == exact_sign_test(8, 2)
    cells = test.cells()
    assert cells[:4] == ["babilong@1k", "MemDLM (Train-Only)", "Standard MDLM", "+50.0"]
    assert cells[5:] == ["0.11", "12", "8 / 2", "sign"]


def test_graded_scores_get_the_permutation_test(tmp_path: Path) -> None:
    answers = {"train_only": [0.2, 0.4, 1.0], "standard": [0.0, 0.4, 0.6]}
    found = evaluation(tmp_path, lambda arm, task, seed: answers.get(arm), ["ruler_vt@4k"])
    test = compare(found, columns(found)[0], found.arm("train_only"), found.arm("standard"))
    assert test.test is not None
    assert test.test.method == "sign flip"
    assert test.test.p_value == sign_flip_test([0.2, 0.0, 0.4]) == 0.5
    assert test.test.difference == pytest.approx(0.2)


def test_a_document_asked_with_several_seeds_is_one_sample(tmp_path: Path) -> None:
    found_once = evaluation(
        tmp_path / "a",
        lambda arm, task, seed: [1.0, float(arm == "train_only")],
        ["longbench_trec"],
        seeds=[0, 1],
    )
    for name in ("standard", "train_only"):
        for seed in (0, 1):
            path = cell_path(tmp_path / "a", name, "longbench_trec", seed)
            samples = read_samples(path)
            for sample in samples:
                sample["prompt_sha256"] = f"document {sample['id']}"
            change(path, samples=samples)
    again = read_evaluation(tmp_path / "a", "run", print)
    arms = found_once.arm("train_only"), found_once.arm("standard")
    different = compare(found_once, columns(found_once)[0], *arms)
    same = compare(again, columns(again)[0], *arms)
    assert different.test is not None and same.test is not None
    assert (different.test.num_samples, same.test.num_samples) == (4, 2)
    assert different.test.difference == same.test.difference == 0.5


def test_arms_that_were_asked_other_questions_are_not_paired(tmp_path: Path) -> None:
    write_evaluation(tmp_path, lambda arm, task, seed: [1, 0], ["ruler_vt@4k"])
    path = cell_path(tmp_path, "standard", "ruler_vt@4k")
    samples = read_samples(path)
    samples[1]["prompt_sha256"] = "another"
    change(path, samples=samples)
    cell_path(tmp_path, "train_inference", "ruler_vt@4k").unlink()
    found = read_evaluation(tmp_path, "run", print)
    (column,) = columns(found)
    test = compare(found, column, found.arm("train_only"), found.arm("standard"))
    assert test.test is None
    assert test.cells()[3] == "not paired: prompts of ruler_vt@4k differ"
    missing = compare(found, column, found.arm("train_inference"), found.arm("standard"))
    assert missing.cells()[3] == "not run in both"
    samples[0]["id"], samples[1]["id"] = 7, 8
    change(path, samples=samples)
    found = read_evaluation(tmp_path, "run", print)
    test = compare(found, column, found.arm("train_only"), found.arm("standard"))
    assert test.cells()[3] == "not paired: no sample of ruler_vt@4k in common"


def test_only_samples_that_both_have_are_compared(tmp_path: Path) -> None:
    found = evaluation(
        tmp_path,
        lambda arm, task, seed: [1, 1, 1] if arm == "train_only" else [0, 1],
        ["ruler_vt@4k"],
    )
    test = compare(found, columns(found)[0], found.arm("train_only"), found.arm("standard"))
    assert test.test is not None
    assert (test.test.num_samples, test.test.difference) == (2, 0.5)


def test_p_values_have_as_many_digits_as_they_mean() -> None:
    assert [p_text(p) for p in (1.0, 0.0425, 0.00012, 9e-5)] == [
        "1",
        "0.043",
        "0.00012",
        "< 0.0001",
    ]


def read_samples(path: Path) -> list[dict]:
    import json

    samples: list[dict] = json.loads(path.read_text())["samples"]
    return samples
