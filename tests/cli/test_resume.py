"""A run that is killed, told to stop, out of disk or changed: nothing is lost or passed over."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from memdlm.cli.settings import read_yaml
from memdlm.files import MARKER
from memdlm.training.checkpoints import CheckpointFolder
from memdlm.training.trainer import MemDLMTrainer

from .conftest import SOURCE, write_recipe, write_rows

LORA = {"kind": "lora", "rank": 2, "dropout": 0.2}
NUM_KILLS = 10
NUM_STEPS = 4 * NUM_KILLS


class Server:
    """Runs commands in forked children; see forking.py."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._child: int | None = None
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forking.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        )

    def start(self, *arguments: object) -> int:
        """Start a command and return the child's id; it writes to `log`."""
        self.log.unlink(missing_ok=True)
        request = {"arguments": [str(argument) for argument in arguments], "log": str(self.log)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self._child = self._answer()
        return self._child

    def end(self) -> int:
        """Wait for the child and return its exit code, or minus the signal that killed it."""
        code = self._answer()
        self._child = None
        return code

    def _answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        """End the server, and the child that a failed test has left."""
        if self._child is not None:
            os.kill(self._child, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """One server for all tests of this file."""
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.close()


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    return load_file(next(run.glob("*/*model.safetensors")))


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and training loss of every log."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Compare final weights bit for bit, and every logged loss."""
    assert losses(one) == losses(other)
    before, after = weights(one), weights(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll so often that a moment of a few milliseconds is not missed."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came to pass"
        time.sleep(5e-4)


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory, rows_file) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    training = {"max_steps": NUM_STEPS, "save_steps": 1}
    recipe = write_recipe(folder, rows_file, folder / "run", adapter=LORA, training=training)
    server.start("train", recipe, "-q")
    assert server.end() == 0, server.log.read_text()
    return folder / "run"


def test_a_run_killed_ten_times_ends_as_the_undisturbed_one(
    server, undisturbed, tmp_path, rows_file
) -> None:
    draws = random.Random()
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    training = {"max_steps": NUM_STEPS, "save_steps": 1}
    recipe = write_recipe(tmp_path, rows_file, run, adapter=LORA, training=training)
    folder = CheckpointFolder(checkpoints)

    def newest(place: Path) -> int:
        try:
            names = os.listdir(place)
        except FileNotFoundError:  # nothing there yet, or not any more
            return 0
        steps = [name.removeprefix("checkpoint-") for name in names]
        return max((int(step) for step in steps if step.isdigit()), default=0)

    num_in_saves = 0
    for number in range(NUM_KILLS):
        options = ["--resume"] if (run / "recipe.yaml").exists() else []
        child = server.start("train", recipe, *options)
        target = 4 * number + 1
        if number % 4 == 3:
            time.sleep(draws.uniform(0, 0.6))  # while starting, or in the first steps
        elif number % 2:
            wait_until(lambda: newest(checkpoints) >= target)  # noqa: B023
            time.sleep(draws.uniform(0, 0.05))  # somewhere in the next step or its save
        else:
            wait_until(lambda: newest(checkpoints / "_partial") >= target)  # noqa: B023
            time.sleep(draws.choice([0, draws.uniform(0, 0.02)]))  # in the save, or just behind
        os.kill(child, signal.SIGKILL)
        assert server.end() == -signal.SIGKILL, server.log.read_text()
        num_in_saves += any(checkpoints.glob("_partial/checkpoint-*"))
        before = folder.all()
        folder.tidy()
        assert folder.newest() is not None or not before
    assert num_in_saves >= 2
    server.start("train", recipe, "--resume")
    assert server.end() == 0, server.log.read_text()
    assert_equal_runs(run, undisturbed)
    assert len(folder.all()) == 2
    assert not any(path.name.startswith("_") for path in checkpoints.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    server, undisturbed, tmp_path, rows_file, number
) -> None:
    run = tmp_path / "run"
    training = {"max_steps": NUM_STEPS, "save_steps": 1000, "save_only_model": True}
    recipe = write_recipe(tmp_path, rows_file, run, adapter=LORA, training=training)
    child = server.start("train", recipe, "-q", "--set", "adapter.rank=2")
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    os.kill(child, number)
    code = server.end()
    assert code == 128 + number
    step = CheckpointFolder(run / "checkpoints").newest().name.rpartition("-")[2]
    assert server.log.read_text() == (
        f"memdlm: stopped by {number.name} after step {step} of {NUM_STEPS}, which is saved: "
        f"continue with memdlm train {recipe} --set adapter.rank=2 --resume\n"
    )
    assert 3 <= int(step) < NUM_STEPS
    server.start("train", recipe, "-q", "--set", "adapter.rank=2", "--resume")
    assert server.end() == 0, server.log.read_text()
    assert server.log.read_text().count("\n") == 2
    assert_equal_runs(run, undisturbed)
    assert json.loads((run / "resumes.jsonl").read_text()) == {
        "from": f"checkpoint-{step}",
        "changed": [],
    }


def test_a_signal_before_training_leaves_nothing(server, tmp_path, rows_file) -> None:
    recipe = write_recipe(tmp_path, rows_file, tmp_path / "run")
    child = server.start("train", recipe)
    wait_until(lambda: server.log.exists() and "train data" in server.log.read_text())
    os.kill(child, signal.SIGTERM)
    assert server.end() == 128 + signal.SIGTERM
    last = server.log.read_text().splitlines()[-1]
    assert last == "memdlm: stopped by SIGTERM without another save"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.fixture
def stopped(memdlm, monkeypatch, tmp_path) -> Callable[..., tuple[Path, Path]]:
    """The function that starts a run and interrupts it after three steps, two of them saved."""

    def start(rows: Path, **changes: object) -> tuple[Path, Path]:
        recipe = write_recipe(tmp_path, rows, tmp_path / "run", **changes)
        step = MemDLMTrainer.training_step

        def stop_at_four(self, *args: object, **kwargs: object) -> torch.Tensor:
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(MemDLMTrainer, "training_step", stop_at_four)
            assert memdlm("train", recipe, "-q", "--set", "training.save_steps=1").code == 130
        return recipe, tmp_path / "run"

    return start


ONE = ("--set", "training.save_steps=1")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / MARKER).unlink(), "it has no complete.json"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"PK"), "optimizer.pt has 2 of "),
        (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_skipped_with_a_line(
    memdlm, stopped, rows_file, damage, reason
) -> None:
    recipe, run = stopped(rows_file)
    damage(run / "checkpoints" / "checkpoint-3")
    resumed = memdlm("train", recipe, "--resume", "-q", *ONE)
    assert resumed.code == 0, resumed.err
    [line] = resumed.err.splitlines()
    assert line.startswith(f"skipped {run / 'checkpoints' / 'checkpoint-3'} because ")
    assert reason in line
    assert json.loads((run / "resumes.jsonl").read_text())["from"] == "checkpoint-2"


def test_a_changed_recipe_is_named_and_goes_on_with_force(memdlm, stopped, rows_file) -> None:
    recipe, run = stopped(rows_file)
    change = (*ONE, "--set", "training.learning_rate=0")
    line = memdlm("train", recipe, "--resume", "-q", *change).error_line(2)
    assert "other settings (training.learning_rate: 0.01 -> 0.0)" in line
    assert "--force" in line
    before = load_file(run / "checkpoints" / "checkpoint-3" / "model.safetensors")
    forced = memdlm("train", recipe, "--resume", "-q", "--force", *change)
    assert forced.code == 0, forced.err
    assert "going on with other settings or data: training.learning_rate" in forced.err
    after = weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)  # the rate is 0 now
    assert read_yaml(run / "recipe.yaml")["training"]["learning_rate"] == 0
    record = json.loads((run / "resumes.jsonl").read_text())
    assert record["changed"] == ["training.learning_rate: 0.01 -> 0.0"]


def test_a_run_recorded_before_a_key_existed_goes_on(memdlm, stopped, rows_file) -> None:
    recipe, run = stopped(rows_file)
    recorded = read_yaml(run / "recipe.yaml")
    del recorded["objective"]["logits_budget"], recorded["quantization"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recorded))
    resumed = memdlm("train", recipe, "--resume", "-q", *ONE)
    assert resumed.code == 0, resumed.err


def test_another_network_is_refused_even_with_force(memdlm, stopped, rows_file) -> None:
    recipe, _ = stopped(rows_file)
    change = (*ONE, "--set", "adapter.kind=lora")
    line = memdlm("train", recipe, "--resume", "--force", *change).error_line(2)
    assert "(adapter.kind: 'none' -> 'lora') that its checkpoints cannot take" in line
    assert "goes with --resume" in memdlm("train", recipe, "--force").error_line(2)


def test_changed_data_are_named_and_go_on_with_force(memdlm, stopped, tmp_path, rows_file) -> None:
    rows = Path(shutil.copy(rows_file, tmp_path / "rows.jsonl"))
    recipe, _ = stopped(rows)
    lines = rows.read_text().splitlines()
    write_rows(rows, [json.loads(line) for line in [lines[1], lines[0], *lines[2:]]])
    assert "other data (data.train: not the same" in memdlm(
        "train", recipe, "--resume", "-q", *ONE
    ).error_line(2)
    forced = memdlm("train", recipe, "--resume", "-q", "--force", *ONE)
    assert forced.code == 0, forced.err
    assert "going on with other settings or data: data.train: " in forced.err


def test_generated_data_are_hashed_too(memdlm, stopped, monkeypatch, rows_file) -> None:
    tasks = {"tasks": ["single_needle"], "length": 40, "num_examples": 8}
    recipe, run = stopped(rows_file, data={"train": None, "tasks": tasks})
    assert json.loads((run / "data.json").read_text()).keys() == {"data.train", "data.eval"}
    from memdlm.cli import recipe_parts

    generate = recipe_parts.generate_examples
    monkeypatch.setattr(recipe_parts, "generate_examples", lambda tasks: generate(tasks)[::-1])
    line = memdlm("train", recipe, "--resume", "-q", *ONE).error_line(2)
    assert "other data (data.train, data.eval: not the same" in line


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 2 MB, where the tests may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
    if os.getuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full_during_a_save_leaves_the_checkpoint_before(
    memdlm, tmp_path, rows_file, small_disk
) -> None:
    run = small_disk / "run"
    training = {"save_steps": 1, "save_total_limit": 1}
    whole = write_recipe(tmp_path, rows_file, tmp_path / "whole", training=training)
    whole = Path(shutil.move(whole, tmp_path / "whole.yaml"))
    assert memdlm("train", whole, "-q").code == 0
    one = tmp_path / "whole" / "checkpoints" / "checkpoint-4"
    size = sum(path.stat().st_size for path in one.iterdir())
    recipe = write_recipe(tmp_path, rows_file, run, training=training)
    # Room for one checkpoint and a half.
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2 * 2**20 - int(1.5 * size) - 2**16))
    line = memdlm("train", recipe, "-q").error_line(1)
    assert "the disk is full, so step 2 could not be saved" in line
    assert CheckpointFolder(run / "checkpoints").newest().name == "checkpoint-1"
    ballast.unlink()
    assert memdlm("train", recipe, "--resume", "-q").code == 0
    assert_equal_runs(run, tmp_path / "whole")
