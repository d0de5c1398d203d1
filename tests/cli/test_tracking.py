"""Trackers of a run, in its folder and off the network; and the commit it was started from."""

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from memdlm.cli.settings import read_yaml
from memdlm.cli.tracking import tracking
from memdlm.versions import collect_commit

from .conftest import spawn

# In this process a tracker may open no connection; sockets of its own machine it may.
OFFLINE = """
import socket, sys
connect = socket.socket.connect
def local_only(self, address):
    assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), address
    return connect(self, address)
socket.socket.connect = local_only
from memdlm.cli import main
sys.exit(main())
"""


def train(recipe: Path, tracker: str) -> None:
    settings = yaml.safe_load(recipe.read_text())
    settings["training"]["report_to"] = tracker
    recipe.write_text(yaml.safe_dump(settings))
    result = spawn("train", recipe, "--quiet", code=OFFLINE)
    assert (result.code, result.err) == (0, "")
    assert len(result.out.splitlines()) == 2, result.out  # what a run without trackers prints


def test_tensorboard_events_land_in_the_run_folder(memdlm, recipe, tmp_path) -> None:
    result = memdlm("train", recipe, "-q", "--set", "training.report_to=tensorboard")
    assert (result.code, result.err) == (0, "")
    place = tmp_path / "run" / "tracking" / "tensorboard"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/loss", "train/nll", "train/inner_loss_1", "eval/loss", "eval/nll"} <= names
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_keeps_its_database_in_the_run_folder(recipe, tmp_path) -> None:
    import sqlite3

    train(recipe, "trackio")
    database = sqlite3.connect(tmp_path / "run" / "tracking" / "trackio" / "memdlm.db")
    logged = database.execute("select run_name, metrics from metrics order by step").fetchall()
    database.close()
    assert {name for name, _ in logged} == {"run"}
    assert "train/inner_loss_1" in str(logged[0][1])
    assert "eval/nll" in str(logged[-1][1])


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_stays_offline_and_in_the_run_folder(recipe, tmp_path) -> None:
    train(recipe, "wandb")
    (record,) = (tmp_path / "run" / "tracking" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"inner_loss_1" in record.read_bytes()


def test_a_missing_tracker_is_one_line_that_names_the_extra(
    memdlm, recipe, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(
        "memdlm.cli.tracking.find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    line = memdlm("train", recipe, "-q", "--set", "training.report_to=wandb").error_line(2)
    assert line == (
        "training.report_to: wandb is not installed; install memdlm[track], or use none"
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_name_is_no_package(tmp_path, monkeypatch) -> None:
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    from memdlm.errors import ConfigError

    with (
        pytest.raises(ConfigError, match="trackio is not installed"),
        tracking("trackio", tmp_path / "t"),
    ):
        raise AssertionError("never entered")


def test_what_the_user_has_set_holds_and_the_rest_is_set_for_the_run_only(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    with tracking(["tensorboard"], tmp_path):
        assert os.environ["WANDB_MODE"] == "online"
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard")
    assert os.environ["WANDB_MODE"] == "online"
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_the_commit_is_recorded_with_whether_files_differ_from_it(
    memdlm, recipe, tmp_path, monkeypatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", *who, *arguments], cwd=home, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert collect_commit(home) == {"git_commit": "none"}
    git("init", "-q")
    assert collect_commit(home) == {"git_commit": "none"}  # a repository without a commit
    (home / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    (home / "untracked").touch()
    assert collect_commit(home) == {"git_commit": commit}
    (home / "file").write_text("2")
    monkeypatch.chdir(home)
    assert memdlm("train", recipe, "-q", "--set", "training.max_steps=1").code == 0
    assert read_yaml(tmp_path / "run" / "versions.json")["git_commit"] == f"{commit} dirty"
