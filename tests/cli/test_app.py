"""The command line itself: instant help, one line per error, exit codes."""

import json
import tomllib
from pathlib import Path

import pytest

from memdlm import __version__
from memdlm.cli import app
from memdlm.cli.app import COMMANDS
from memdlm.errors import CheckpointError, ConfigError, MemDLMError
from memdlm.files import is_disk_full

from .conftest import spawn

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["plan", "--help"], ["generate", "--help"]]
)
def test_help_imports_neither_torch_nor_transformers(arguments) -> None:
    code = (
        "import sys; from memdlm.cli import main; code = main()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    result = spawn(*arguments, code=code)
    assert result.code == 0, result.err
    assert "Usage: memdlm" in result.out


def test_every_command_is_in_the_help_and_has_help(memdlm) -> None:
    overview = memdlm("--help")
    for name in COMMANDS:
        assert name in overview.out
        page = memdlm(name, "--help")
        assert page.code == 0
        assert f"Usage: memdlm {name}" in page.out
    assert memdlm().out == overview.out


def test_help_does_not_break_lines_where_the_source_does(memdlm, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "Several of it on one folder share the work." in memdlm("sweep", "--help").out


def test_the_installed_entry_point_is_main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["memdlm"] == "memdlm.cli:main"
    assert callable(app.main)


def test_version_and_env(memdlm) -> None:
    assert memdlm("--version").out == f"memdlm {__version__}\n"
    assert "transformers" in memdlm("env").out
    found = json.loads(memdlm("env", "--json").out)
    assert {"python", "torch", "memdlm", "accelerator"} <= found.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], "No such command 'tarin'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "x.yaml", "--resum"], "No such option: --resum"),
        (["train", "x.yaml", "--resume", "--overwrite"], "exclude each other"),
        (["generate", "a prompt"], "Missing option '--model'"),
        (["generate", "--model", "m", "--memory", "maybe", "p"], "--memory maybe: write on, off"),
        (["generate", "--model", "m", "--file", "f", "p"], "give a prompt or --file, not both"),
        (["recipe", "no.such.key"], "no key contains 'no.such.key'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(memdlm, arguments, message) -> None:
    assert message in memdlm(*arguments).error_line(2)


def raises(error: BaseException):
    def command(*args: object, **kwargs: object) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("memory.rank: 0"), 2, "memory.rank: 0"),
        (CheckpointError("gone"), 1, "gone"),
        (
            OSError(28, "No space left on device", "x.bin"),
            1,
            "the disk is full while writing x.bin",
        ),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0"),
            1,
            "the disk is full: free",
        ),
        (
            PermissionError(13, "Permission denied", "/r"),
            1,
            "/r (Permission denied): check the rights",
        ),
        (ImportError("No module named 'x'"), 1, "a package is missing (No module named 'x')"),
        (MemoryError(), 1, "the device's memory is full"),
        (ZeroDivisionError("a\nb"), 1, "unexpected ZeroDivisionError: a b; run again with --debug"),
    ],
)
def test_whatever_fails_is_one_line(memdlm, monkeypatch, error, code, message) -> None:
    monkeypatch.setattr("memdlm.versions.collect_versions", raises(error))
    assert message in memdlm("env").error_line(code)


def test_a_full_disk_is_recognised_behind_another_error() -> None:
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as cause:
            raise ValueError("could not serialise") from cause
    except ValueError as error:
        assert is_disk_full(error)
    assert not is_disk_full(MemDLMError("other"))


def test_interrupting_ends_with_130(memdlm, monkeypatch) -> None:
    monkeypatch.setattr("memdlm.versions.collect_versions", raises(KeyboardInterrupt()))
    result = memdlm("env")
    assert (result.code, result.err) == (130, "memdlm: interrupted\n")


def test_debug_shows_the_traceback(memdlm, monkeypatch) -> None:
    monkeypatch.setattr("memdlm.versions.collect_versions", raises(CheckpointError("gone")))
    with pytest.raises(CheckpointError, match="gone"):
        memdlm("env", "--debug")


def test_a_reader_that_leaves_is_no_error() -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import sys; from memdlm.cli import main;"
        " sys.exit(main())', 'recipe'], stdout=subprocess.PIPE, stderr=subprocess.PIPE)\n"
        "child.stdout.close()\n"
        "sys.stderr.buffer.write(child.stderr.read())\n"
        "child.wait()"
    )
    result = spawn(code=code)
    assert (result.code, result.err) == (0, "")
