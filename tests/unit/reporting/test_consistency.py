"""What must be said before the numbers, the settings that differ, and where numbers come from."""

import json
from pathlib import Path
from typing import Any

import pytest

from memdlm.reporting.blocks import Part
from memdlm.reporting.consistency import (
    arm_differences,
    common_settings,
    task_differences,
    warnings,
)
from memdlm.reporting.provenance import provenance_blocks
from memdlm.reporting.results import Evaluation, read_evaluation
from tests.evaluation_folders import COMMIT, VERSIONS, arm, cell_path, change, write_evaluation

TASKS = ["ruler_vt@4k", "ruler_cwe@4k"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_evaluation(
        tmp_path, lambda arm, task, seed: [1, 0], TASKS, num_samples=dict.fromkeys(TASKS, 2)
    )


def read(folder: Path) -> Evaluation:
    return read_evaluation(folder, "run", lambda line: None)


def test_an_evaluation_in_order_has_no_warning(folder: Path) -> None:
    assert warnings(read(folder)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings__sampling__temperature": 0.7},
            "sampling.temperature differs between arms on ruler_vt@4k, so their scores do not "
            "compare (0.7: standard; 0.0: train_inference, train_only)",
        ),
        ({"settings__data_hash": "f" * 64}, "data_hash differs between arms on ruler_vt@4k"),
        ({"settings__num_samples": 3}, "num_samples differs between arms on ruler_vt@4k"),
        ({"settings__dtype": "float32"}, "dtype differs between arms on ruler_vt@4k"),
        ({"settings__dtype": "float32"}, "dtype differs between the results of standard, which"),
        (
            {"settings__adapter_fingerprint": "other"},
            "adapter_fingerprint differs between the results of standard, which are not of one arm",
        ),
        (
            {"provenance__commit": "f" * 40},
            "the results were made by different commits (0123456789ab: ",
        ),
        ({"provenance__commit": f"{COMMIT} dirty"}, "1 of 6 results were made with changes that"),
        (
            {"provenance__versions": {**VERSIONS, "torch": "2.14.0"}},
            "the results were made with several versions of torch: 2.13.0, 2.14.0",
        ),
        (
            {"provenance__adapter": "runs/other"},
            "results of standard were made with inclusionAI/LLaDA-MoE-7B-A1B-Base + runs/other, "
            "and evaluation.json names inclusionAI/LLaDA-MoE-7B-A1B-Base + runs/standard/adapter",
        ),
        (
            {"settings__memory__enabled": True},
            "results of standard on ruler_vt@4k were made with a memory, against what",
        ),
        ({"metrics__score__value": 0.9}, "the score that results/standard/ruler_vt@4k/seed0.json"),
    ],
)
def test_what_must_be_equal_and_is_not_is_said(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    change(cell_path(folder, "standard", "ruler_vt@4k"), **changes)
    found = warnings(read(folder))
    assert any(message in line for line in found), found


def test_other_numbers_of_samples_are_said(folder: Path) -> None:
    change(folder / "evaluation.json", num_samples={"ruler_vt@4k": 500})
    (line,) = warnings(read(folder))
    assert (
        "another number of samples than asked for (standard on ruler_vt@4k, seed 0: 2 of 500"
        in (line)
    )


def test_memories_that_were_dropped_and_prompts_that_were_cut_are_counted(folder: Path) -> None:
    path = cell_path(folder, "train_inference", "ruler_vt@4k")
    samples = json.loads(path.read_text())["samples"]
    samples[0]["memory"] = "dropped"
    samples[1]["num_dropped_tokens"] = 31
    change(path, samples=samples)
    cut, dropped = warnings(read(folder))
    assert cut.startswith("1 prompts were longer than the model's context")
    assert "was dropped for 1 samples (train_inference on ruler_vt@4k, seed 0)" in dropped


def test_a_stranger_is_named(folder: Path) -> None:
    path = cell_path(folder, "standard", "ruler_vt@4k")
    stranger = cell_path(folder, "standard", "ruler_vt@8k")
    stranger.parent.mkdir()
    stranger.write_bytes(path.read_bytes())
    change(stranger, task="ruler_vt@8k")
    (line,) = warnings(read(folder))
    assert line.endswith("results/standard/ruler_vt@8k/seed0.json")


def test_a_memorys_settings_are_no_difference_where_there_is_none(folder: Path) -> None:
    # As the runner writes a memory that is off.
    for task in TASKS:
        change(cell_path(folder, "standard", task), settings__memory=None)
    evaluation = read(folder)
    differing = arm_differences(evaluation)
    assert list(differing) == ["adapter_fingerprint", "memory.enabled"]
    assert differing["memory.enabled"] == ["false", "false", "true"]
    common = common_settings(evaluation)
    assert (common["memory.rank"], common["sampling.temperature"]) == ("32", "0.0")
    assert "data_hash" not in common
    assert warnings(evaluation) == []


def test_memories_that_differ_are_shown_for_the_arms_that_have_one(tmp_path: Path) -> None:
    arms = [arm("standard"), arm("0.2"), arm("0.5", prompt_mask_ratio=0.5)]
    write_evaluation(tmp_path, lambda arm, task, seed: [1], TASKS, arms=arms)
    differing = arm_differences(read(tmp_path))
    assert differing["memory.prompt_mask_ratio"] == ["–", "0.2", "0.5"]  # noqa: RUF001


def test_settings_of_a_task_are_listed_by_value(folder: Path) -> None:
    differing = task_differences(read(folder))
    assert list(differing) == ["data_hash"]
    assert [tasks for _, tasks in differing["data_hash"]] == ["ruler_cwe@4k", "ruler_vt@4k"]


def test_every_result_file_has_its_row_with_hash_command_commit_and_settings(folder: Path) -> None:
    change(
        cell_path(folder, "standard", "ruler_vt@4k"),
        provenance__command="memdlm eval again",
        provenance__commit=f"{COMMIT} dirty",
    )
    evaluation = read(folder)
    page = Part("", provenance_blocks(evaluation)).section().body
    for result in evaluation.results.values():
        assert f"<td>{result.path}</td>" in page
        assert result.digest in page
    assert "<details><summary>Where the numbers come from: 6 result files</summary>" in page
    assert "memdlm eval again" in page
    assert f"<td>{COMMIT[:12]} dirty</td>" in page
    assert f"<td>{COMMIT} dirty</td>" in page
    assert "torch 2.13.0" in page
    assert "<td>memory.rank</td><td>32</td>" in page
    assert "runs/&lt;b&gt;" in page  # the command of the others
