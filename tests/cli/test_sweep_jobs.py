"""Jobs that depend on one another, fail, are held by others, and lose the one who started them."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from memdlm.cli.sweep_jobs import Job, duration, run_jobs
from memdlm.errors import StoppedError

from .conftest import SOURCE


def job(
    folder: Path, name: str, code: str = "", after: Sequence[str] = (), kind: str = "any"
) -> Job:
    """Return a job that runs `code`, then leaves a file of its name."""
    done = folder / f"{name}.done"
    program = f"{code}\nopen({str(done)!r}, 'a').write('x')"
    return Job(
        name,
        kind,
        lambda: [sys.executable, "-c", program],
        folder / name,
        done.is_file,
        tuple(after),
    )


def wait_for(path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def test_jobs_run_after_those_they_depend_on_and_only_once(tmp_path) -> None:
    names = ("first", "second")
    order = f"open({str(tmp_path / 'order')!r}, 'a').write(%r)"
    jobs = [
        job(tmp_path, "second", order % "2", after=["first"]),
        job(tmp_path, "first", order % "1"),
    ]
    for _ in range(2):
        assert sorted(run_jobs(jobs, num_parallel=2).done) == sorted(names)
    assert (tmp_path / "order").read_text() == "12"
    assert [(tmp_path / f"{name}.done").read_text() for name in names] == ["x", "x"]


def test_a_failed_job_stops_what_needs_it_and_nothing_else(tmp_path) -> None:
    lines: list[str] = []
    jobs = [
        job(tmp_path, "bad", "raise SystemExit('no such thing')"),
        job(tmp_path, "needs_bad", after=["bad"]),
        job(tmp_path, "needs_that", after=["needs_bad"]),
        job(tmp_path, "good"),
    ]
    outcome = run_jobs(jobs, say=lines.append)
    assert outcome.done == ["good"]
    assert list(outcome.failed) == ["bad"]
    assert "exit code 1" in outcome.failed["bad"] and str(jobs[0].log) in outcome.failed["bad"]
    assert outcome.blocked == ["needs_bad", "needs_that"]
    assert "no such thing" in jobs[0].log.read_text()
    assert any("FAILED" in line for line in lines)


def test_a_job_that_ends_well_without_a_result_has_failed(tmp_path) -> None:
    idle = Job("idle", "any", lambda: [sys.executable, "-c", ""], tmp_path / "idle", lambda: False)
    assert "no result" in run_jobs([idle]).failed["idle"]


def test_gpus_are_given_in_turn(tmp_path) -> None:
    code = (
        "import os, pathlib, time\n"
        "me, other = {0!r}, {1!r}\n"
        "pathlib.Path(me).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "while not pathlib.Path(other).exists(): time.sleep(0.02)"
    )
    here = [str(tmp_path / name) for name in ("a.gpu", "b.gpu")]
    jobs = [
        job(tmp_path, "a", code.format(here[0], here[1])),
        job(tmp_path, "b", code.format(here[1], here[0])),
    ]
    run_jobs(jobs, num_parallel=2, gpus=("3", "5"))
    assert sorted(Path(path).read_text() for path in here) == ["3", "5"]


def test_progress_says_what_is_left_and_how_long(tmp_path) -> None:
    lines: list[str] = []
    jobs = [job(tmp_path, name, "import time; time.sleep(1)") for name in ("a", "b", "c")]
    run_jobs(jobs, say=lines.append)
    ends = [line for line in lines if "done in" in line]
    assert "2 of 3 left, about" in ends[0]
    assert "none left" in ends[2]
    assert [duration(s) for s in (0.2, 47, 720, 11_520)] == ["under 1 s", "47 s", "12 min", "3.2 h"]


def test_what_another_process_holds_is_left_to_it_while_other_work_is_done(tmp_path) -> None:
    held, free = job(tmp_path, "held"), job(tmp_path, "free")
    handle = os.open(held.lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)

    def finish_it() -> None:
        wait_for(tmp_path / "free.done")
        (tmp_path / "held.done").write_text("by another")
        os.close(handle)

    other = threading.Thread(target=finish_it)
    other.start()
    lines: list[str] = []
    outcome = run_jobs([held, free], say=lines.append)
    other.join()
    assert sorted(outcome.done) == ["free", "held"]
    assert (tmp_path / "held.done").read_text() == "by another"
    assert "held: another process is at it" in lines


RUNNER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from cli.test_sweep_jobs import job
from memdlm.cli.sweep_jobs import run_jobs
folder = Path({folder!r})
code = "import time; open({started!r}, 'w'); time.sleep({seconds})"
run_jobs([job(folder, "long", code)])
"""


def start_runner(folder: Path, seconds: float) -> "subprocess.Popen[bytes]":
    """Start a process whose one job takes `seconds`, and wait until that has begun."""
    started = folder / "started"
    tests = str(Path(__file__).parents[1])
    code = RUNNER.format(folder=str(folder), started=str(started), seconds=seconds, tests=tests)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_for(started)
    return process


def test_the_lock_outlives_a_runner_that_was_killed_for_as_long_as_its_job(tmp_path) -> None:
    runner = start_runner(tmp_path, seconds=2.0)
    runner.kill()
    runner.wait()
    assert not (tmp_path / "long.done").exists()
    lines: list[str] = []
    outcome = run_jobs([job(tmp_path, "long")], say=lines.append)
    assert outcome.done == ["long"]
    assert lines == ["long: another process is at it"]
    assert (tmp_path / "long.done").read_text() == "x"


def test_sigterm_ends_the_jobs_too(tmp_path) -> None:
    runner = start_runner(tmp_path, seconds=60.0)
    since = time.monotonic()
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(timeout=20) != 0
    assert time.monotonic() - since < 20
    # The job is gone as well: its lock is free.
    handle = os.open(tmp_path / "long.lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


def test_a_signal_in_this_process_raises_and_restores_the_handlers(tmp_path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(StoppedError) as stopped:
        run_jobs([job(tmp_path, "long", "import time; time.sleep(60)")])
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
