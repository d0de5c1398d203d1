"""Drives the real command line: in this process for speed, in another where that matters."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from memdlm.cli import main

SOURCE = Path(__file__).parents[2] / "src"


@dataclass(frozen=True)
class Result:
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    def error_line(self, code: int) -> str:
        """Return the error, having checked that it is one line and nothing else went wrong."""
        assert self.code == code, self.err
        assert "Traceback" not in self.err
        lines = [
            line for line in self.err.splitlines() if not line.startswith(("train data", "eval"))
        ]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("memdlm: error: ")
        assert self.out == ""
        return lines[0].removeprefix("memdlm: error: ")


@pytest.fixture
def memdlm(capsys) -> Callable[..., Result]:
    """Run a command in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def spawn(*arguments: object, stdin: str = "", code: str = "") -> Result:
    """Run a command, or Python `code`, in a process of its own."""
    program = code or "import sys; from memdlm.cli import main; sys.exit(main())"
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


TINY = {
    "tiny": {
        "sizes": {
            "width": 16,
            "num_layers": 2,
            "num_heads": 2,
            "mlp_width": 16,
            "context_length": 64,
        }
    },
    "data": {"max_length": 64, "test_fraction": 0.25},
    "memory": {"rank": 2},
    "training": {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
    },
}
PEOPLE = ["ada", "bo", "cy", "di", "ed", "flo", "gus", "hal"]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """A few prompt/completion rows."""
    rows = [
        {"prompt": f"{name} hid the key in box {i} . where is it ?", "completion": f"in box {i}"}
        for i, name in enumerate(PEOPLE)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def write_recipe(folder: Path, rows: Path, output: Path, **changes: object) -> Path:
    """Write the tiny recipe, with top-level sections updated by `changes`."""
    recipe = {**TINY, "output_dir": str(output)}
    recipe["data"] = {**TINY["data"], "train": str(rows)}
    for key, value in changes.items():
        before = recipe.get(key)
        merge = isinstance(before, dict) and isinstance(value, dict)
        recipe[key] = {**before, **value} if merge else value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def recipe(tmp_path, rows_file) -> Path:
    """The tiny recipe; its run folder is `run` beside it."""
    return write_recipe(tmp_path, rows_file, tmp_path / "run")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, rows_file) -> Path:
    """A finished run of the tiny recipe, with memory."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_recipe(folder, rows_file, folder / "run")
    assert main(["train", str(path), "--quiet"]) == 0
    return folder / "run"
