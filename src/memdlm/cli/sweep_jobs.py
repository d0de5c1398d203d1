"""Runs commands that depend on one another, several at once, each by one process at a time.

Knows commands, not what they do. A job holds an exclusive lock on a file while it runs; its process
inherits the lock, so a job whose starter was killed stays locked until it has ended itself, and
another starter does other work meanwhile. What is done is asked of the disk, never remembered: a
killed run goes on by being started again.
"""

import fcntl
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memdlm.cli.signals import noted_signals
from memdlm.errors import StoppedError

Say = Callable[[str], None]

_POLL_SECONDS = 0.1
# How often locks that others hold are tried.
_RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: What messages call it; different for every job.
        kind: Jobs of one kind take about equally long: what the time left is reckoned from.
        command: Program and arguments.
        place: Path without suffix, beside which `.lock` and `.log` are written.
        is_done: Whether its result is on the disk.
        after: Names of the jobs that must be done before.
    """

    name: str
    kind: str
    command: Callable[[], Sequence[str]]
    place: Path
    is_done: Callable[[], bool]
    after: tuple[str, ...] = ()

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.place.with_name(f"{self.place.name}.log")

    @property
    def lock(self) -> Path:
        """What is locked while it runs; kept, since removing it would let two hold it."""
        return self.place.with_name(f"{self.place.name}.lock")


@dataclass
class JobsOutcome:
    """How jobs ended, by name.

    Attributes:
        done: Their results are there, made now or before.
        failed: Ended with an error, with the reason.
        blocked: Not started, since one that they depend on failed.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Running:
    job: Job
    process: "subprocess.Popen[bytes]"
    since: float


def run_jobs(
    jobs: Sequence[Job],
    *,
    num_parallel: int = 1,
    gpus: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    say: Say = lambda line: None,
) -> JobsOutcome:
    """Run every job that is not done, in order where it can be.

    Args:
        jobs: Those that others depend on come first.
        num_parallel: Processes at a time.
        gpus: Values of CUDA_VISIBLE_DEVICES, given to the processes in turn; empty leaves it alone.
        environment: Further variables of the processes.
        say: Receives a line when a job starts and ends.

    Raises:
        StoppedError: SIGTERM or Ctrl-C came; the processes were told and have ended.
    """
    run = _Run(jobs, num_parallel, gpus, {**os.environ, **(environment or {})}, say)
    with noted_signals() as received:
        return run.until_done(received)


class _Run:
    def __init__(
        self,
        jobs: Sequence[Job],
        num_parallel: int,
        gpus: Sequence[str],
        environment: dict[str, str],
        say: Say,
    ) -> None:
        self.pending = list(jobs)
        self.num_jobs = len(jobs)
        self.gpus, self.environment, self.say = gpus, environment, say
        self.slots: list[_Running | None] = [None] * num_parallel
        self.outcome = JobsOutcome()
        self.seconds: dict[str, list[float]] = {}
        self.tried: dict[str, float] = {}

    def until_done(self, received: list[int]) -> JobsOutcome:
        try:
            while self.pending or any(self.slots):
                if received:
                    raise StoppedError("stopped", received[0])
                self._collect()
                self._start_some()
                if self.pending or any(self.slots):
                    time.sleep(_POLL_SECONDS)
        except BaseException:
            self._end_all()
            raise
        return self.outcome

    def _collect(self) -> None:
        """Take note of processes that have ended."""
        for index, running in enumerate(self.slots):
            if running is None or running.process.poll() is None:
                continue
            self.slots[index] = None
            seconds = time.monotonic() - running.since
            job, code = running.job, running.process.returncode
            if code == 0 and job.is_done():
                self.seconds.setdefault(job.kind, []).append(seconds)
                self.outcome.done.append(job.name)
                self.say(f"{job.name}: done in {duration(seconds)}; {self._left()}")
            else:
                reason = f"exit code {code}" if code else "it ended well but left no result"
                reason += _last_words(job.log)
                self.outcome.failed[job.name] = f"{reason}; see {job.log}"
                self.say(f"{job.name}: FAILED ({reason}), see {job.log}; {self._left()}")

    def _start_some(self) -> None:
        """Start what can be started on free slots, and settle what needs no process."""
        for job in list(self.pending):
            missing = [name for name in job.after if name not in self.outcome.done]
            if any(name in self.outcome.failed or name in self.outcome.blocked for name in missing):
                self.pending.remove(job)
                self.outcome.blocked.append(job.name)
            elif not missing and None in self.slots:
                self._try(job)

    def _try(self, job: Job) -> None:
        """Start a job unless another holds it; one that is done only leaves the list."""
        now = time.monotonic()
        first_time = job.name not in self.tried
        if not first_time and now - self.tried[job.name] < _RETRY_SECONDS:
            return
        self.tried[job.name] = now
        job.lock.parent.mkdir(parents=True, exist_ok=True)
        # Inherited by the process, so that the lock is held for as long as either lives.
        handle = os.open(job.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if first_time:
                    self.say(f"{job.name}: another process is at it")
                return
            self.pending.remove(job)
            if job.is_done():
                self.outcome.done.append(job.name)
                return
            self._launch(job, handle)
        finally:
            os.close(handle)

    def _launch(self, job: Job, lock: int) -> None:
        index = self.slots.index(None)
        environment = dict(self.environment)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[index % len(self.gpus)]
        command = list(job.command())
        with job.log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
            )
        self.slots[index] = _Running(job, process, time.monotonic())
        where = f" on GPU {environment['CUDA_VISIBLE_DEVICES']}" if self.gpus else ""
        self.say(f"{job.name}: started{where}")

    def _left(self) -> str:
        """Say how many jobs are left and, where jobs of their kinds have ended, how long."""
        jobs = [*self.pending, *(running.job for running in self.slots if running is not None)]
        if not jobs:
            return "none left"
        known = [job for job in jobs if job.kind in self.seconds]
        text = f"{len(jobs)} of {self.num_jobs} left"
        if not known:
            return text
        total = sum(_mean(self.seconds[job.kind]) for job in known) / len(self.slots)
        return f"{text}, {'about' if len(known) == len(jobs) else 'over'} {duration(total)}"

    def _end_all(self) -> None:
        """Let every process end in good order: a training writes a checkpoint first."""
        running = [one.process for one in self.slots if one is not None]
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()


def duration(seconds: float) -> str:
    """Return seconds as a reader wants them: under 1 s, 47 s, 12 min, 3.2 h."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _last_words(log: Path) -> str:
    """Return `: ` and the error that the last line of a log tells of; nothing if it tells none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = lines[-1] if lines else ""
    found = last.partition("memdlm: error: ")[2]
    return f": {found}" if found else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
