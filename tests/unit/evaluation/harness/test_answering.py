"""Batches, shares, memory that runs out, and waiting for others; answers are made up here."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from memdlm.errors import ConfigError, DataError, UsageError
from memdlm.evaluation.harness.answering import Answering, Job, plan_batches
from memdlm.evaluation.harness.progress import (
    ProgressMeter,
    ProgressReport,
    describe,
    describe_start,
)
from memdlm.evaluation.harness.response_cache import ResponseCache
from memdlm.evaluation.harness.sharding import Shard, ShareDone


def jobs(lengths: Sequence[int], **facts: Any) -> list[Job]:
    return [
        Job(f"key{i}", length, 10 * length, length - 2, 2, **facts)
        for i, length in enumerate(lengths)
    ]


class Recorder:
    """Answers a job with its place, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], int]] = []

    def __call__(self, places: Sequence[int], divisor: int) -> list[dict[str, Any]]:
        self.calls.append((tuple(places), divisor))
        return [{"place": place} for place in places]


def test_batches_hold_jobs_of_similar_length_the_longest_first() -> None:
    batches = plan_batches(jobs([3, 9, 5, 7, 4]), batch_size=2)
    assert [batch.jobs for batch in batches] == [(1, 3), (2, 4), (0,)]
    assert [batch.length for batch in batches] == [9, 5, 3]
    assert batches[0].work == 180  # both rows are as long as the longer one


def test_the_plan_does_not_depend_on_the_order_of_jobs() -> None:
    given = jobs([3, 9, 5, 7, 4, 4, 4])
    plan = [[given[i].key for i in batch.jobs] for batch in plan_batches(given, 2)]
    turned = given[::-1]
    assert [[turned[i].key for i in batch.jobs] for batch in plan_batches(turned, 2)] == plan


def test_tokens_limit_batches_and_kinds_and_units_stay_apart_and_together() -> None:
    assert [b.jobs for b in plan_batches(jobs([8, 4, 4, 4, 2]), 4, batch_tokens=12)] == [
        (0,),
        (1, 2, 3),
        (4,),
    ]
    mixed = [*jobs([5, 5], kind="a"), Job("other", 5, 50, 3, 2, kind="b")]
    assert sorted(batch.jobs for batch in plan_batches(mixed, 8)) == [(0, 1), (2,)]
    units = [Job(f"key{i}", 4 + i, 40, 3, 2, unit=i // 2) for i in range(6)]
    assert [batch.jobs for batch in plan_batches(units, 2)] == [(4, 5, 2, 3), (0, 1)]
    assert [batch.num_rows for batch in plan_batches(units, 2)] == [2, 1]


def test_stored_answers_are_not_computed_again(tmp_path: Path) -> None:
    given, first, second = jobs([3, 9, 5, 7]), Recorder(), Recorder()
    with ResponseCache(tmp_path) as cache:
        cache.put({"key3": {"place": "stored"}})
        answers = Answering(2, cache=cache).run("generate_until", given, first)
        assert [answer["place"] for answer in answers] == [0, 1, 2, "stored"]
        # Batches are planned as if nothing were stored.
        assert first.calls == [((1,), 1), ((2, 0), 1)]
        assert Answering(2, cache=cache).run("generate_until", given, second) == answers
    assert second.calls == []


def test_a_batch_is_stored_before_the_next_one_is_computed(tmp_path: Path) -> None:
    def compute(places: Sequence[int], divisor: int) -> list[dict[str, Any]]:
        if 0 in places:
            raise RuntimeError("power cut")
        return [{} for _ in places]

    with ResponseCache(tmp_path) as cache, pytest.raises(RuntimeError, match="power cut"):
        Answering(1, cache=cache).run("generate_until", jobs([3, 9, 5]), compute)
    with ResponseCache(tmp_path) as cache:
        assert cache.get(["key0", "key1", "key2"]) == {"key1": {}, "key2": {}}


def test_a_batch_that_exceeds_the_device_is_halved_and_said_so(monkeypatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # slow beside everything pytest holds
    said, asked = [], Recorder()

    def compute(places: Sequence[int], divisor: int) -> list[dict[str, Any]]:
        answers = asked(places, divisor)
        if 8 / divisor * 10 > 25:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return answers

    answering = Answering(8, say=said.append)
    answers = answering.run("generate_until", jobs([10] * 16), compute)
    assert [answer["place"] for answer in answers] == list(range(16))
    # The second batch starts where the first one got through.
    assert [divisor for _, divisor in asked.calls] == [1, 2, 4, 4]
    assert said == [
        f"a batch of 8 rows with up to 10 tokens exceeds the device's memory; going on with 1/{n} "
        "of it at a time"
        for n in (2, 4)
    ]

    asked.calls.clear()
    # One unit of many rows, as where a continuation has many masks.
    assert Answering(1).run("loglikelihood", jobs([10]), compute, rows=8) == [{"place": 0}]
    assert [divisor for _, divisor in asked.calls] == [1, 2, 4]

    def never(places: Sequence[int], divisor: int) -> list[dict[str, Any]]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(ConfigError, match=r"a request of 10 tokens exceeds .* even alone"):
        Answering(4).run("generate_until", jobs([10] * 3), never)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_batch_belongs_to_one_process_and_shares_are_alike(count: int) -> None:
    work = [batch.work for batch in plan_batches(jobs([(i * 37) % 50 + 5 for i in range(60)]), 4)]
    owned = [Shard(index, count).owns(work) for index in range(count)]
    assert all(sum(flags) == 1 for flags in zip(*owned, strict=True))
    loads = [sum(w for w, own in zip(work, flags, strict=True) if own) for flags in owned]
    assert max(loads) - min(loads) <= max(work)


def test_shards_are_read_from_words_and_from_torchrun(monkeypatch) -> None:
    assert Shard.parse("1/4") == Shard(1, 4)
    assert Shard.parse("environment") == Shard(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Shard.from_environment() == Shard.parse("environment") == Shard(2, 3)
    assert Shard(2, 3).name == "2-of-3"
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(UsageError, match="RANK=two"):
        Shard.from_environment()
    for text in ("4/4", "1", "a/b"):
        with pytest.raises(UsageError, match="shard"):
            Shard.parse(text)


def test_shares_meet_in_the_cache(tmp_path: Path) -> None:
    given = jobs(range(5, 25))
    others = [ResponseCache(tmp_path, Shard(index, 2)) for index in (0, 1)]
    asked = [Recorder(), Recorder()]
    parts = [
        Answering(3, cache=cache, shard=Shard(i, 2), gathers=i == 0, wait_seconds=20)
        for i, cache in enumerate(others)
    ]
    with pytest.raises(ShareDone):
        parts[1].run("generate_until", given, asked[1])
    answers = parts[0].run("generate_until", given, asked[0])
    assert [answer["place"] for answer in answers] == list(range(20))
    places = [{place for places, _ in recorder.calls for place in places} for recorder in asked]
    assert places[0] | places[1] == set(range(20))
    assert not places[0] & places[1]


def test_every_process_can_wait_for_all(tmp_path: Path) -> None:
    given, found = jobs(range(5, 25)), {}

    def work(index: int) -> None:
        with ResponseCache(tmp_path, Shard(index, 2)) as cache:
            answering = Answering(3, cache=cache, shard=Shard(index, 2), wait_seconds=20)
            found[index] = answering.run("generate_until", given, Recorder())

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == [{"place": place} for place in range(20)]


def test_waiting_ends_with_news_of_failure_or_without_any_news(tmp_path: Path) -> None:
    given = jobs(range(5, 15))
    mine = ResponseCache(tmp_path, Shard(0, 2))
    first = Answering(3, cache=mine, shard=Shard(0, 2), wait_seconds=0.3)
    with pytest.raises(DataError, match=r"answers of other processes .* none came for 0.3 s"):
        first.run("generate_until", given, Recorder())

    def fail(places: Sequence[int], divisor: int) -> list[dict[str, Any]]:
        raise ValueError("the other's trouble\nin two lines")

    def other() -> None:
        time.sleep(0.2)
        with ResponseCache(tmp_path, Shard(1, 2)) as cache, pytest.raises(ValueError):
            Answering(3, cache=cache, shard=Shard(1, 2)).run("generate_until", given, fail)

    thread = threading.Thread(target=other)
    thread.start()
    patient = Answering(3, cache=mine, shard=Shard(0, 2), wait_seconds=30)
    with pytest.raises(DataError, match=r"writes 1-of-2.sqlite has failed \(the other's trouble\)"):
        patient.run("generate_until", given, Recorder())
    thread.join()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size: 0"):
        Answering(0)
    with pytest.raises(ConfigError, match="batch_tokens: 0"):
        Answering(1, 0)
    with pytest.raises(UsageError, match=r"2 processes .* response cache: give it a folder"):
        Answering(shard=Shard(0, 2))


def test_progress_is_told_before_the_start_and_after_every_batch(tmp_path: Path) -> None:
    seen: list[ProgressReport] = []
    with ResponseCache(tmp_path) as cache:
        cache.put({"key0": {}})
        answering = Answering(2, cache=cache, on_progress=seen.append)
        plan = answering.start("generate_until", jobs([4, 8, 8, 6]))
        assert seen == []
        answering.run("generate_until", jobs([4, 8, 8, 6]), Recorder())
    start, middle, end = seen
    assert start == plan
    assert (start.num_requests, start.num_stored, start.num_own) == (4, 1, 3)
    assert (start.prompt_tokens, start.new_tokens, start.work) == (6 + 6 + 4, 6, 220)
    assert start.seconds_left is None
    assert (middle.num_done, middle.work_done) == (2, 160)
    assert middle.seconds_left is not None
    assert (end.num_done, end.work_done, end.seconds_left, end.is_done) == (3, 220, 0.0, True)
    assert describe_start(start) == (
        "4 requests, 1 of them answered before; to compute: 3 with 16 prompt tokens and up to 6 "
        "new ones"
    )


def test_time_left_follows_tokens_and_the_newest_batches_most() -> None:
    now = [0.0]
    seen: list[ProgressReport] = []
    start = ProgressReport("generate_until", 10, 0, 10, 0, 100, 100, 1000)
    meter = ProgressMeter(start, seen.append, clock=lambda: now[0])
    now[0] = 20.0
    meter.batch_done(1, 200)  # 0.1 seconds each
    assert seen[-1].seconds_left == pytest.approx(80.0)
    assert describe(seen[-1]) == "1/10 requests, 0:01:20 left"
    now[0] = 60.0
    meter.batch_done(1, 200)  # 0.2 seconds each
    assert seen[-1].seconds_left == pytest.approx(600 * 0.12)
    meter.waiting(3)
    meter.waiting(3)
    assert len(seen) == 4
    assert describe(seen[0]) == "0/10 requests"
    waiting = ProgressReport("generate_until", 10, 0, 5, 5, 1, 1, 1, num_awaited=5)
    assert describe(waiting) == "waiting for 5 answers of other processes"
    assert not waiting.is_done
    assert "5 for other processes" in describe_start(waiting)
