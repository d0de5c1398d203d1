"""How far a run is, in numbers: requests, tokens, time left. Draws nothing.

Time left follows the tokens that the model reads, padding and every denoising step included, since
that is what a request costs; a count of requests would promise too much time while the long ones,
which come first, are being answered.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

# Weight of the newest batch in the mean speed: some ten batches decide it.
_WEIGHT = 0.2


@dataclass(frozen=True)
class ProgressReport:
    """Where a run is. The first one comes before anything is computed.

    Attributes:
        kind: What is asked: `generate_until`, `loglikelihood` or `loglikelihood_rolling`.
        num_requests: All requests of this call.
        num_stored: Those that the response cache had answers for at the start.
        num_own: Those that this process is to compute; the others of the rest are other shards'.
        num_done: Those of `num_own` that are computed.
        prompt_tokens: Tokens of the prompts of `num_own`.
        new_tokens: Tokens that their answers have at most, or that are scored.
        work: Tokens that the model is to read for `num_own`, padding and all steps included.
        work_done: Those read so far.
        seconds_left: Time until `num_own` are computed; None before the first batch.
        num_awaited: Requests whose answers other processes still owe.
    """

    kind: str
    num_requests: int
    num_stored: int
    num_own: int
    num_done: int
    prompt_tokens: int
    new_tokens: int
    work: int
    work_done: int = 0
    seconds_left: float | None = None
    num_awaited: int = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to compute or to wait for."""
        return self.num_done == self.num_own and self.num_awaited == 0


OnProgress = Callable[[ProgressReport], None]


class ProgressMeter:
    """Counts batches and tells `on_progress`."""

    def __init__(
        self,
        start: ProgressReport,
        on_progress: OnProgress | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Tell of the start."""
        self.report, self._on_progress, self._clock = start, on_progress, clock
        self._seconds_per_work: float | None = None
        self._since = clock()
        self._tell()

    def batch_done(self, num_requests: int, work: int) -> None:
        """Count a batch of so many requests, which was planned to read `work` tokens."""
        now = self._clock()
        speed = (now - self._since) / max(1, work)
        self._since = now
        before = self._seconds_per_work
        self._seconds_per_work = (
            speed if before is None else _WEIGHT * speed + (1 - _WEIGHT) * before
        )
        done = self.report.work_done + work
        self.report = replace(
            self.report,
            num_done=self.report.num_done + num_requests,
            work_done=done,
            seconds_left=self._seconds_per_work * (self.report.work - done),
        )
        self._tell()

    def waiting(self, num_awaited: int) -> None:
        """Note how many answers other processes still owe; tell if that has changed."""
        if num_awaited != self.report.num_awaited:
            self.report = replace(self.report, num_awaited=num_awaited)
            self._tell()

    def _tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.report)


def describe_start(report: ProgressReport) -> str:
    """Return the line to say before a run starts."""
    line = f"{report.num_requests:,} requests"
    if report.num_stored:
        line += f", {report.num_stored:,} of them answered before"
    others = report.num_requests - report.num_stored - report.num_own
    if others:
        line += f", {others:,} for other processes"
    return (
        f"{line}; to compute: {report.num_own:,} with {report.prompt_tokens:,} prompt tokens and "
        f"up to {report.new_tokens:,} new ones"
    )


def describe(report: ProgressReport) -> str:
    """Return the line to say in the course of a run."""
    if report.num_done == report.num_own and report.num_awaited:
        return f"waiting for {report.num_awaited:,} answers of other processes"
    line = f"{report.num_done:,}/{report.num_own:,} requests"
    if report.seconds_left is None:
        return line
    seconds = round(report.seconds_left)
    return f"{line}, {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
