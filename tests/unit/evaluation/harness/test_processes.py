"""Real processes: killed in the middle and run again, or sharing the requests between them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memdlm.evaluation.harness.response_cache import ResponseCache
from tests.unit.evaluation.harness import worker
from tests.unit.evaluation.harness.asking import MEMORY, ask, build_lm

ROOT = Path(__file__).parents[4]

# Runs one process per (shard, batch to be killed in) and returns exit code and log of each.
Run = Callable[..., list[tuple[int, Any]]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, str(Path(worker.__file__))],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    stdin, stdout = server.stdin, server.stdout
    assert stdout.readline() == "ready\n"

    def ask_server(folder: Path, *places: tuple[str, int]) -> list[tuple[int, Any]]:
        logs = [folder.with_name(f"{folder.name}-{i}.json") for i in range(len(places))]
        jobs = [
            {"folder": str(folder), "shard": shard, "kill": kill, "log": str(log)}
            for (shard, kill), log in zip(places, logs, strict=True)
        ]
        stdin.write(json.dumps(jobs) + "\n")
        stdin.flush()
        codes = json.loads(stdout.readline())
        found = [json.loads(log.read_text()) if log.exists() else None for log in logs]
        return list(zip(codes, found, strict=True))

    yield ask_server
    server.kill()  # it has no children by now, and torch takes its time to say goodbye
    server.wait(timeout=30)
    stdin.close()
    stdout.close()


@pytest.fixture(scope="module")
def undisturbed() -> list[str]:
    lm = build_lm(memory=MEMORY, sampling=worker.SAMPLING, batch_size=2)
    return lm.generate_until(ask(worker.REQUESTS))


def test_a_killed_run_goes_on_where_it_was_and_answers_the_same(
    run: Run, tmp_path: Path, undisturbed
) -> None:
    folder = tmp_path / "responses"
    assert run(folder, ("0/1", 4)) == [(-signal.SIGKILL, None)]
    with ResponseCache(folder) as cache:
        stored = dict(cache._own.execute("SELECT key, value FROM answers"))
    assert len(stored) == 6  # three batches of two
    ((code, log),) = run(folder, ("0/1", 0))
    assert code == 0
    assert log == [7 - 3, undisturbed]
    with ResponseCache(folder) as cache:
        after = dict(cache._own.execute("SELECT key, value FROM answers"))
    assert len(after) == len(worker.REQUESTS)
    assert {key: after[key] for key in stored} == stored


def test_two_processes_give_what_one_gives(run: Run, tmp_path: Path, undisturbed) -> None:
    folder = tmp_path / "responses"
    (first, (calls, texts)), (second, (others, done)) = run(folder, ("0/2", 0), ("1/2", 0))
    assert (first, second) == (0, 0)
    assert texts == undisturbed
    assert done == ["share done"]
    assert calls + others == 7
    assert min(calls, others) >= 3
    assert {path.name for path in folder.iterdir()} == {"0-of-2.sqlite", "1-of-2.sqlite"}
    # Another number of processes goes on from what these have answered.
    lm = build_lm(memory=MEMORY, sampling=worker.SAMPLING, batch_size=2, cache=folder)
    (report,) = lm.plan(ask(worker.REQUESTS))
    assert (report.num_stored, report.num_own) == (len(worker.REQUESTS), 0)
