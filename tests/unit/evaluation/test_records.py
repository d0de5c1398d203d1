"""An evaluation's folder: whole cells, never mixed, grown only where nothing is contradicted."""

import json
from pathlib import Path
from typing import Any

import pytest

from memdlm.errors import CheckpointError, UsageError
from memdlm.evaluation.records import CellKey, EvaluationFolder

KEY = CellKey("standard", "ruler_vt@4k", 0)


def description(**changes: Any) -> dict[str, Any]:
    arms = [{"name": "a", "model": "base"}, {"name": "b", "model": None}]
    return {"format": 1, "command": "memdlm eval", "arms": arms, "tasks": ["t@96"], **changes}


@pytest.fixture
def folder(tmp_path: Path) -> EvaluationFolder:
    made = EvaluationFolder(tmp_path / "eval")
    made.begin(description(), {"torch": "1"})
    return made


def test_a_cell_comes_back_under_its_own_settings(folder: EvaluationFolder) -> None:
    settings = {"sampling": {"stop_tokens": (1, 2)}, "num_samples": 3}
    assert folder.read(KEY, settings) is None
    folder.write(KEY, {"settings": settings, "metrics": {}})
    found = folder.read(KEY, settings)
    assert found is not None
    assert (found["arm"], found["task"], found["seed"]) == ("standard", "ruler_vt@4k", 0)


def test_a_cell_of_other_settings_is_refused(folder: EvaluationFolder) -> None:
    folder.write(KEY, {"settings": {"memory": {"rank": 8}}, "metrics": {}})
    with pytest.raises(UsageError, match=r"memory\.rank: 8 -> 32.*never mixed"):
        folder.read(KEY, {"memory": {"rank": 32}})


def test_a_damaged_cell_is_named(folder: EvaluationFolder) -> None:
    folder.write(KEY, {"settings": {}, "metrics": {}})
    path = folder.cell_path(KEY)
    path.write_text(path.read_text()[:20])
    with pytest.raises(CheckpointError, match=r"seed0\.json.*delete it"):
        folder.read(KEY, {})


def test_the_same_evaluation_may_begin_again_by_another_command(folder: EvaluationFolder) -> None:
    before = (folder.path / "evaluation.json").read_bytes()
    folder.begin(description(command="memdlm eval again"), {"torch": "2"})
    assert (folder.path / "evaluation.json").read_bytes() == before


def test_an_arm_without_a_model_may_get_one_later(folder: EvaluationFolder) -> None:
    arms = [{"name": "a", "model": None}, {"name": "b", "model": "other"}]
    folder.begin(description(arms=arms), {})
    found = json.loads((folder.path / "evaluation.json").read_text())
    assert [arm["model"] for arm in found["arms"]] == ["base", "other"]


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": ["t@192"]},
        {"arms": [{"name": "a", "model": "another"}, {"name": "b", "model": None}]},
        {"arms": [{"name": "a", "model": "base"}]},
    ],
)
def test_another_evaluation_is_refused(folder: EvaluationFolder, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="holds an evaluation with other"):
        folder.begin(description(**changes), {})


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="holds other files"):
        EvaluationFolder(tmp_path).begin(description(), {})
