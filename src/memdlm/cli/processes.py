"""The same command in several processes of this machine, each told its place as torchrun would.

Without torchrun's rendezvous, since our processes never talk to one another. The first one speaks
for all; what another says is heard only if it fails.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

import typer

from memdlm.cli.signals import noted_signals
from memdlm.errors import MemDLMError, StoppedError, UsageError

_POLL_SECONDS = 0.05
# How long the others may go on when one has failed: they may have an error of their own to tell.
_GRACE_SECONDS = 5.0


def is_one_of_several(count: int) -> bool:
    """Tell whether this process is one of the `count`; otherwise it is the one to start them.

    Raises:
        UsageError: A launcher has started another number of processes.
    """
    given = os.environ.get("WORLD_SIZE")
    if given is not None and given != str(count):
        raise UsageError(
            f"--processes {count}: a launcher has started {given} (WORLD_SIZE): leave one of the "
            "two out"
        )
    return given is not None


def run_processes(count: int, arguments: Sequence[str]) -> None:
    """Run memdlm with `arguments` in `count` processes until all have ended well.

    Threads are divided among them, unless OMP_NUM_THREADS says how many each may have.

    Raises:
        typer.Exit: The first process failed and has said why; with its exit code.
        MemDLMError: Another one failed.
        StoppedError: SIGTERM or Ctrl-C came; all have been ended.
    """
    with tempfile.TemporaryFile() as said, noted_signals() as received:
        processes = [_start(index, count, arguments, said) for index in range(count)]
        try:
            failed = _until_ended(processes, received)
        finally:
            _end(processes)
        if failed is None:
            return
        if failed == 0:
            raise typer.Exit(_exit_code(processes[0]))
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("memdlm: error: ")]
        reason = errors[-1].removeprefix("memdlm: error: ") if errors else "it said nothing"
        code = processes[failed].returncode
        raise MemDLMError(
            f"process {failed} of {count} has failed with exit code {code} ({reason}); what is "
            "answered is kept: mend that and type the same command again"
        )


def _start(
    index: int, count: int, arguments: Sequence[str], said: IO[bytes]
) -> "subprocess.Popen[bytes]":
    environment = {
        "OMP_NUM_THREADS": str(max(1, _num_cores() // count)),
        **os.environ,
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "memdlm.cli", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=None if index == 0 else subprocess.DEVNULL,
        stderr=None if index == 0 else said,
        env=environment,
    )


def _num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _until_ended(processes: Sequence["subprocess.Popen[bytes]"], received: list[int]) -> int | None:
    """Wait; return the place of one that failed, the first process if it did, or None.

    Raises:
        StoppedError: A signal came.
    """
    deadline = float("inf")
    while True:
        if received:
            raise StoppedError(
                "stopped; what is answered is kept: type the same command to go on", received[0]
            )
        codes = [process.poll() for process in processes]
        failed = [index for index, code in enumerate(codes) if code]
        if None not in codes or codes[0] or time.monotonic() > deadline:
            return failed[0] if failed else None
        if failed:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        time.sleep(_POLL_SECONDS)


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait()


def _exit_code(process: "subprocess.Popen[bytes]") -> int:
    """Return the exit code as a shell gives it: 128 and its number for a signal."""
    code = process.returncode
    return 128 - code if code < 0 else code
