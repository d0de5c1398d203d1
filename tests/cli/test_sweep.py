"""Sweeps with real processes: killed and started again, and with a variant that fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from .conftest import SOURCE, TINY

FAST = (
    "--set",
    "training.max_steps=2",
    "--set",
    "training.save_steps=1",
    "--set",
    "data.tasks.num_examples=64",
    "--eval-set",
    "tasks=[generated_two_fact_story@96]",
    "-n",
    "2",
)


def test_a_sweep_killed_in_a_training_goes_on_and_repeats_nothing(tmp_path, memdlm) -> None:
    arguments = ["sweep", "paper/table1", "--model", "tiny", *FAST, "--output", str(tmp_path / "s")]
    arguments += ["--limit-variants", "train_only,train_inference"]
    program = "import sys; from memdlm.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    trainings = tmp_path / "s" / "trainings"
    sweep = subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment)
    for _ in range(1200):
        if list(trainings.glob("*.log")):
            break
        time.sleep(0.05)
    sweep.send_signal(signal.SIGKILL)
    assert sweep.wait() == -signal.SIGKILL
    assert not list(trainings.glob("*/model"))

    again = memdlm(*arguments)
    assert again.code == 0, again.err
    assert "another process is at it" in again.err  # the training outlived its sweep
    (log,) = trainings.glob("*.log")
    assert log.read_text().count("$ ") == 1
    assert len(list(trainings.glob("*/model"))) == 1
    check_results(tmp_path / "s")

    third = memdlm(*arguments)
    assert third.code == 0, third.err
    assert "2 of them done before" in third.err
    assert "started" not in third.err


def test_repeated_trainings_are_one_table_over_their_seeds(tmp_path, memdlm) -> None:
    output = tmp_path / "s"
    arguments = ["sweep", "paper/table1", "--model", "tiny", *FAST, "--output", str(output)]
    arguments += ["--limit-variants", "train_only", "--training-seeds", "0,1", "--jobs", "2"]
    done = memdlm(*arguments)
    assert done.code == 0, done.err
    for seed in (0, 1):
        described = json.loads((output / f"training_seed{seed}" / "evaluation.json").read_text())
        assert described["training_seed"] == seed
    models = [path.read_bytes() for path in output.glob("trainings/*/model/model.safetensors")]
    assert len(models) == 2 and models[0] != models[1]
    assert "2 trainings" in done.out
    assert "2 trainings" in (output / "report" / "report.md").read_text()
    assert "one standard error over trainings" in (output / "report" / "report.html").read_text()


def check_results(folder: Path) -> None:
    """Expect both arms' cells, the absent arm's description, and a report."""
    described = json.loads((folder / "evaluation.json").read_text())
    assert described["preset"] == "paper/table1"
    assert described["is_tiny"]
    names = [arm["name"] for arm in described["arms"]]
    assert names == ["standard", "train_only", "train_inference"]
    cells = {
        path.parents[1].name: json.loads(path.read_text())
        for path in folder.glob("results/*/*/seed0.json")
    }
    assert set(cells) == {"train_only", "train_inference"}
    assert [s["memory"] for s in cells["train_inference"]["samples"]] == ["written", "written"]
    assert [s["memory"] for s in cells["train_only"]["samples"]] == ["off", "off"]
    assert cells["train_only"]["provenance"]["command"].startswith("memdlm ")
    assert (folder / "report" / "report.html").is_file()


def test_a_failed_training_is_named_with_its_log_and_ends_with_1(tmp_path, memdlm) -> None:
    path = tmp_path / "recipe.yaml"
    data = {**TINY["data"], "train": str(tmp_path / "missing.jsonl")}  # type: ignore[dict-item]
    path.write_text(yaml.safe_dump({**TINY, "data": data}))
    sweep = memdlm(
        *("sweep", "ablations/steps", "--recipe", path, "--output", tmp_path / "s"),
        *("--limit-variants", "standard_mdlm", "--eval-set", "tasks=[babilong_qa1@1k]"),
    )
    assert sweep.code == 1
    lines = sweep.err.splitlines()
    (log,) = (tmp_path / "s" / "trainings").glob("*.log")
    assert any(line.startswith("FAILED training") and str(log) in line for line in lines)
    assert any("missing.jsonl" in line for line in lines)  # the training's own words
    assert any(line.startswith("NOT RUN ablations/steps, standard_mdlm") for line in lines)
    assert lines[-1].startswith("memdlm: error: 1 of 2 jobs failed and 1 were not run")
    assert "Traceback" not in sweep.err
