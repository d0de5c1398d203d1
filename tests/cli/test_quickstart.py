"""`memdlm quickstart` as a command: its output folder, its messages, what a failure leaves."""

from pathlib import Path

import pytest

from memdlm.cli import main
from memdlm.quickstart import run

SMALL = [
    "--set=num_steps=1",
    "--set=num_train_examples=32",
    "--set=batch_size=4",
    "--set=num_eval_examples=2",
    "--set=num_bias_examples=1",
    "--set=tasks=[single_needle]",
    "--set=length_factors=[1]",
]


def test_prints_the_table_and_writes_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs" / "quickstart"
    assert main(["quickstart", "--output", str(output), *SMALL]) == 0
    printed = capsys.readouterr()
    assert "Standard MDLM" in printed.out
    assert "MemDLM (Train & Inference)" in printed.out
    assert f"open {output / 'report.html'}" in printed.out
    assert "training memdlm: 1 steps" in printed.err
    names = {path.name for path in output.iterdir()}
    assert {"results.json", "report.html", "mdlm", "memdlm"} <= names
    assert [path.name for path in output.parent.iterdir()] == ["quickstart"]

    assert main(["quickstart", "--output", str(output), *SMALL]) == 2
    line = capsys.readouterr().err
    assert "already holds results" in line
    assert "--overwrite" in line
    assert main(["quickstart", "--output", str(output), "--overwrite", "--quiet", *SMALL]) == 0
    assert capsys.readouterr().err == ""


def test_a_folder_with_other_files_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["quickstart", "--output", str(tmp_path), "--overwrite", *SMALL]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "evaluate_setting", fail)
    assert main(["quickstart", "--output", str(tmp_path / "out"), *SMALL]) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("num_stepz=1", "did you mean num_steps"),
        ("num_steps=0", "quickstart.num_steps"),
        ("memory.rank=0", "memory.rank"),
        ("tasks=[single_nedle]", "did you mean 'single_needle'"),
    ],
)
def test_bad_settings_are_one_line(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["quickstart", "--quiet", "--output", str(output), "--set", setting]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()
