"""Seconds and peak bytes of a function, on the CPU or a CUDA device. Knows nothing of models."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

# The record of single allocations has no public face yet.
_ALLOCATION = torch._C._profiler._EventType.Allocation


def time_interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of every repeat of every run, after one untimed round.

    The runs take turns, so that a machine that slows down slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Return the median over repeats of the ratio of two runs that took turns."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that tensors held during `run` beyond those held before it.

    On CUDA the caching allocator knows. On the CPU the profiler records every allocation and
    release, summed here in order: exact and repeatable, where the process's resident size depends
    on what malloc keeps, and `tracemalloc` does not see tensors at all. Scratch memory that kernels
    take outside torch's allocator is not included.
    """
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    pending = list(recorded.profiler.kineto_results.experimental_event_tree())
    changes = []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _ALLOCATION and event.extra_fields.device.type == "cpu":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, change in sorted(changes, key=lambda timed: timed[0]):
        held += change
        peak = max(peak, held)
    return peak


def wait(device: torch.device) -> None:
    """Wait until `device` has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
