"""Get the answers to all requests of a call: stored ones, own ones in batches, other processes'.

Batches are planned over all requests, whether or not they are stored, so that every process plans
the same ones, and a run that goes on after it was killed computes each answer in the batch it would
have been in. Each batch is stored as soon as it is answered. Knows neither model nor text.
"""

import gc
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from memdlm.errors import ConfigError, DataError, MemDLMError, UsageError
from memdlm.evaluation.harness.progress import OnProgress, ProgressMeter, ProgressReport
from memdlm.evaluation.harness.response_cache import Answer, ResponseCache
from memdlm.evaluation.harness.sharding import Shard, ShareDone

# A failure that another process has noted before this one began is that of an earlier run.
_BEGAN = time.time()


@dataclass(frozen=True)
class Job:
    """One request, as far as batching has to know it.

    Attributes:
        key: What its answer is stored under; of no two jobs the same.
        length: Tokens of its row, answer included.
        work: Tokens the model is to read for it, without padding.
        prompt_tokens: Tokens of its prompt.
        new_tokens: Tokens that are generated, at most, or scored.
        kind: Jobs of different kinds never share a batch.
        unit: Jobs of one unit are never parted; None for a unit of its own.
    """

    key: str
    length: int
    work: int
    prompt_tokens: int
    new_tokens: int
    kind: Hashable = None
    unit: Hashable = None


@dataclass(frozen=True)
class Batch:
    """Jobs that are computed together.

    Attributes:
        jobs: Their places in the list of all jobs, units in order of falling length.
        num_rows: Units among them.
        length: Tokens of the longest job.
        work: Tokens to read, with the padding up to `length`.
    """

    jobs: tuple[int, ...]
    num_rows: int
    length: int
    work: int


# From jobs, by their places, and a divisor to their answers in order: with divisor 2, no more than
# half as many rows may be in a forward as there would be with 1.
Compute = Callable[[Sequence[int], int], list[Answer]]


@dataclass
class Answering:
    """How requests are answered; one object serves many calls.

    Attributes:
        batch_size: Most units of a batch.
        batch_tokens: Most tokens of a batch, padding included; None for no limit. A unit that has
            more is a batch of its own.
        cache: Where answers are stored; None to keep none.
        shard: This process's share.
        gathers: Whether this process waits for the answers of the others and returns all; one that
            does not raises `ShareDone` in place of returning.
        wait_seconds: How long to wait without news of the others.
        say: Told what a user should know.
        on_progress: Told of every batch.
    """

    batch_size: int = 8
    batch_tokens: int | None = None
    cache: ResponseCache | None = None
    shard: Shard = field(default_factory=Shard)
    gathers: bool = True
    wait_seconds: float = 3600.0
    say: Callable[[str], None] = lambda line: None
    on_progress: OnProgress | None = None
    # Tokens of a batch that did not fit the device's memory; longer ones are divided at once.
    _too_many: float = float("inf")

    def __post_init__(self) -> None:
        """Check ranges, and that shares can meet."""
        for name in ("batch_size", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} is out of range; use 1 or more")
        if self.shard.count > 1 and self.cache is None:
            raise UsageError(
                f"{self.shard.count} processes share the requests, and their answers meet in the "
                "response cache: give it a folder"
            )

    def run(
        self, name: str, jobs: Sequence[Job], compute: Compute, rows: int | None = None
    ) -> list[Answer]:
        """Return the answer of every job, in order.

        Args:
            name: What is asked, for progress reports.
            jobs: All jobs, the same in every process.
            compute: Answers those that are this process's to compute.
            rows: Rows of a forward, where they are not the units of a batch.

        Raises:
            ShareDone: This process has done its share and does not gather.
            DataError: The other processes have failed, or nothing came of them for too long.
        """
        try:
            return self._run(name, jobs, compute, rows)
        except ShareDone:
            raise
        except BaseException as error:
            self._tell_others(error)
            raise

    def start(self, name: str, jobs: Sequence[Job]) -> ProgressReport:
        """Return the report a run would begin with, computing nothing."""
        answers = self._stored(jobs)
        return _report(name, jobs, len(answers), self._own(jobs, answers))

    def _stored(self, jobs: Sequence[Job]) -> dict[str, Answer]:
        return {} if self.cache is None else self.cache.get(job.key for job in jobs)

    def _run(
        self, name: str, jobs: Sequence[Job], compute: Compute, rows: int | None
    ) -> list[Answer]:
        answers = self._stored(jobs)
        own = self._own(jobs, answers)
        meter = ProgressMeter(_report(name, jobs, len(answers), own), self.on_progress)
        for batch, places in own:
            fresh = self._compute(batch, places, compute, rows or batch.num_rows)
            found = {jobs[place].key: answer for place, answer in zip(places, fresh, strict=True)}
            if self.cache is not None:
                self.cache.put(found)
            answers |= found
            meter.batch_done(len(places), _work(jobs, places))
        if not self.gathers:
            raise ShareDone(f"process {self.shard.name} has answered its share")
        self._await_others([job.key for job in jobs if job.key not in answers], answers, meter)
        return [answers[job.key] for job in jobs]

    def _own(
        self, jobs: Sequence[Job], answers: dict[str, Answer]
    ) -> list[tuple[Batch, list[int]]]:
        """Return this process's batches, with the jobs of each that have no answer yet."""
        batches = plan_batches(jobs, self.batch_size, self.batch_tokens)
        owned = self.shard.owns([batch.work for batch in batches])
        todo = [
            (batch, [place for place in batch.jobs if jobs[place].key not in answers])
            for batch, is_own in zip(batches, owned, strict=True)
            if is_own
        ]
        return [(batch, places) for batch, places in todo if places]

    def _compute(
        self, batch: Batch, places: Sequence[int], compute: Compute, rows: int
    ) -> list[Answer]:
        """Answer a batch, in parts where the whole exceeds the device's memory."""
        divisor, tokens = 1, rows * batch.length
        while tokens / divisor >= self._too_many and divisor < rows:
            divisor *= 2
        while True:
            try:
                return compute(places, divisor)
            except torch.OutOfMemoryError as error:
                if divisor >= rows:
                    raise ConfigError(
                        f"a request of {batch.length:,} tokens exceeds the device's memory even "
                        f"alone ({str(error).splitlines()[0]}): use quantization nf4, or a device "
                        "with more memory"
                    ) from error
                self._too_many = min(self._too_many, tokens / divisor)
            # Out of the handler, whose traceback would hold the tensors that are too many.
            divisor *= 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.say(
                f"a batch of {rows} rows with up to {batch.length:,} tokens exceeds the "
                f"device's memory; going on with 1/{divisor} of it at a time"
            )

    def _await_others(
        self, missing: list[str], answers: dict[str, Answer], meter: ProgressMeter
    ) -> None:
        """Collect what other processes compute, as it comes."""
        last_news = time.monotonic()
        while missing:
            assert self.cache is not None
            found = self.cache.get(missing)
            answers |= found
            missing = [key for key in missing if key not in found]
            meter.waiting(len(missing))
            if not missing:
                return
            for name, reason in self.cache.failures(_BEGAN).items():
                raise DataError(
                    f"the process that writes {name} has failed ({reason}): mend that and run the "
                    "same command again; what is answered already is kept"
                )
            if found:
                last_news = time.monotonic()
            waited = time.monotonic() - last_news
            if waited > self.wait_seconds:
                raise DataError(
                    f"{self.cache.folder}: {len(missing):,} answers of other processes are missing "
                    f"and none came for {self.wait_seconds:g} s: start all {self.shard.count} "
                    "processes, with the same command, or run it with one"
                )
            # What comes is seen late by a twentieth of the wait, at most by two seconds.
            time.sleep(min(2.0, max(0.005, waited / 20)))

    def _tell_others(self, error: BaseException) -> None:
        if self.cache is None or self.shard.count == 1:
            return
        with suppress(MemDLMError):  # the error that matters is on its way already
            self.cache.mark_failed(str(error).splitlines()[0] if str(error) else repr(error))


def _report(
    name: str, jobs: Sequence[Job], num_stored: int, own: Sequence[tuple[Batch, list[int]]]
) -> ProgressReport:
    todo = [jobs[place] for _, places in own for place in places]
    return ProgressReport(
        kind=name,
        num_requests=len(jobs),
        num_stored=num_stored,
        num_own=len(todo),
        num_done=0,
        prompt_tokens=sum(job.prompt_tokens for job in todo),
        new_tokens=sum(job.new_tokens for job in todo),
        work=sum(_work(jobs, places) for _, places in own),
    )


def plan_batches(
    jobs: Sequence[Job], batch_size: int, batch_tokens: int | None = None
) -> list[Batch]:
    """Return batches of units of one kind and of similar length, the largest first.

    The plan depends on the jobs alone, not on their order.

    Args:
        jobs: All jobs.
        batch_size: Most units of a batch.
        batch_tokens: Most tokens of a batch, padding included; None for no limit.
    """
    units: dict[Hashable, list[int]] = {}
    for place, job in enumerate(jobs):
        units.setdefault((job.kind, job.key if job.unit is None else job.unit), []).append(place)
    for members in units.values():
        members.sort(key=lambda place: jobs[place].key)
    kinds: dict[Hashable, list[list[int]]] = {}
    for members in units.values():
        kinds.setdefault(jobs[members[0]].kind, []).append(members)
    batches = []
    for rows in kinds.values():
        rows.sort(key=lambda row: (-_length(jobs, row), jobs[row[0]].key))
        start = 0
        while start < len(rows):
            size = batch_size
            if batch_tokens is not None:
                size = max(1, min(size, batch_tokens // _length(jobs, rows[start])))
            part = rows[start : start + size]
            places = tuple(place for row in part for place in row)
            length, work = _length(jobs, part[0]), _work(jobs, places)
            batches.append(Batch(places, len(part), length, work))
            start += size
    batches.sort(key=lambda batch: (-batch.length, -batch.work, jobs[batch.jobs[0]].key))
    return batches


def _length(jobs: Sequence[Job], places: Sequence[int]) -> int:
    return max(jobs[place].length for place in places)


def _work(jobs: Sequence[Job], places: Sequence[int]) -> int:
    """Return the tokens read for these jobs when each is padded to the longest."""
    longest = _length(jobs, places)
    return sum(jobs[place].work * longest // jobs[place].length for place in places)
