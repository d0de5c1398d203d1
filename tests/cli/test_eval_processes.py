"""`memdlm eval --processes`: real processes that share requests, fail, and are stopped."""

import signal
import sqlite3
import time

import pytest
from typer import Exit

from memdlm.cli.processes import is_one_of_several, run_processes
from memdlm.errors import MemDLMError, UsageError
from tests.cli.test_eval import MODEL, TASK, cells, finish, num_answers, start

COMMAND = ("eval", TASK, *MODEL, "--batch-size", "2", "-o", "out")
WORDS = ["eval", "x", "--processes", "2"]


def test_two_processes_give_what_one_gives(tmp_path) -> None:
    command = (*COMMAND, "--memory", "on", "-n", "12")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone = start(tmp_path / "one", *command)
    pair = start(tmp_path / "two", *command, "--processes", "2")
    finish(alone)
    printed = finish(pair)
    (one,) = cells(tmp_path / "one" / "out").values()
    (two,) = cells(tmp_path / "two" / "out").values()
    assert one["samples"] == two["samples"] and one["metrics"] == two["metrics"]
    assert printed.count("results in out") == 1
    files = sorted((tmp_path / "two" / "out" / "responses").glob("*.sqlite"))
    assert [path.name for path in files] == ["0-of-2.sqlite", "1-of-2.sqlite"]
    for path in files:  # both had work to do
        assert sqlite3.connect(path).execute("SELECT COUNT(*) FROM answers").fetchone()[0] == 6


def test_all_are_stopped_together_and_go_on_together(tmp_path) -> None:
    command = (*COMMAND, "-n", "200", "--memory", "on", "--processes", "2")
    run = start(tmp_path, *command)
    end = time.monotonic() + 100
    while num_answers(tmp_path / "out") < 4:
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "memdlm: stopped; what is answered is kept" in printed
    stored = num_answers(tmp_path / "out")
    time.sleep(0.3)
    assert 4 <= num_answers(tmp_path / "out") == stored < 200  # nobody goes on in the background
    printed = finish(start(tmp_path, *command))
    assert "of them answered before" in printed


def test_an_evaluation_is_overwritten_once_another_has_begun(tmp_path) -> None:
    command = (*COMMAND, "--processes", "2", "--overwrite")
    finish(start(tmp_path, *COMMAND, "-n", "2"))
    before = cells(tmp_path / "out")
    wrong = start(tmp_path, "eval", "no_such_task", *command[2:], "-n", "4")
    printed, _ = wrong.communicate(timeout=60)
    assert wrong.returncode == 2
    assert "no_such_task" in printed
    assert cells(tmp_path / "out") == before
    finish(start(tmp_path, *command, "-n", "4", "--dry-run"))
    assert cells(tmp_path / "out") == before
    finish(start(tmp_path, *command, "-n", "4"))
    (cell,) = cells(tmp_path / "out").values()
    assert len(cell["samples"]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_evaluation_that_cannot_be_moved_is_left(tmp_path) -> None:
    finish(start(tmp_path, *COMMAND, "-n", "2"))
    command = (*COMMAND[:-1], ".", "--processes", "2", "--overwrite")
    run = start(tmp_path / "out", *command)  # a folder that one stands in
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "memdlm: error: cannot overwrite . (" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(cells(tmp_path / "out")) == 1
    assert not list((tmp_path / "out").glob("..*"))


def test_processes_overwrite_no_other_files(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    run = start(tmp_path, *COMMAND, "-n", "2", "--processes", "2", "--overwrite")
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "holds no evaluation" in printed
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_an_error_of_all_is_said_once(tmp_path) -> None:
    run = start(
        tmp_path, "eval", TASK, "--model", "/nowhere/at/all", "-o", "out", "--processes", "2"
    )
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert printed.count("memdlm: error:") == 1 and "no model folder" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shard", "0/2"), "leave one of them out"),
        (("--preset", "paper/figure3", "--tiny"), "--processes"),
        (("--overwrite",), "delete the folder"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(
    memdlm, tmp_path, monkeypatch, arguments, message
) -> None:
    (tmp_path / "eval").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "2")  # as in one of the two, the first of which speaks
    command = (*MODEL, "--processes", "2", *arguments, "-o", tmp_path / "eval")
    if "--preset" not in arguments:
        command = (TASK, *command)
    assert message in memdlm("eval", *command).error_line(2)


def test_a_launcher_that_starts_another_number_is_refused(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not is_one_of_several(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_one_of_several(2)
    with pytest.raises(UsageError, match="a launcher has started 2"):
        is_one_of_several(4)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a program in the place of ours, which does by its RANK what it is told."""

    def write(source: str) -> None:
        package = tmp_path / "memdlm" / "cli"
        package.mkdir(parents=True)
        (tmp_path / "memdlm" / "__init__.py").touch()
        (package / "__init__.py").touch()
        text = f"import os, sys, time\nrank, words = os.environ['RANK'], sys.argv[1:]\n{source}"
        (package / "__main__.py").write_text(text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return write


def test_the_failure_of_another_process_ends_all_and_is_told(program, monkeypatch) -> None:
    monkeypatch.setattr("memdlm.cli.processes._GRACE_SECONDS", 0.2)
    error = "print('memdlm: error: no space left', file=sys.stderr)"
    program(f"if rank == '1':\n    {error}\n    sys.exit(3)\ntime.sleep(60)")
    since = time.monotonic()
    with pytest.raises(MemDLMError, match=r"process 1 of 2 .* exit code 3 \(no space left\)"):
        run_processes(2, WORDS)
    assert time.monotonic() - since < 30


def test_the_first_process_speaks_for_itself(program) -> None:
    program("sys.exit(2 if rank == '0' else time.sleep(60))")
    with pytest.raises(Exit) as failure:
        run_processes(2, WORDS)
    assert failure.value.exit_code == 2


def test_each_is_told_its_place_and_its_threads(program, tmp_path, monkeypatch) -> None:
    names = "('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'OMP_NUM_THREADS')"
    program(f"open(rank, 'w').write(repr([os.environ[n] for n in {names}] + words))")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("memdlm.cli.processes._num_cores", lambda: 6)
    run_processes(2, WORDS)
    for rank in ("0", "1"):
        assert (tmp_path / rank).read_text() == repr([rank, rank, "2", "3", *WORDS])
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    run_processes(2, WORDS)
    assert "'5'" in (tmp_path / "1").read_text()
