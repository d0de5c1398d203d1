"""Samples per second of an evaluation against one request at a time, the published way.

    python -m benchmarks.speed.evaluate                    # some minutes on two idle cores
    python -m benchmarks.speed.evaluate --words 96 --memory off
    python -m benchmarks.speed.evaluate --together         # the three lengths as one evaluation
    python -m benchmarks.speed.evaluate --help

The ways are in `evaluation_ways`: the published one; ours one at a time; ours in batches; and the
same in as many processes as there are cores, `memdlm eval --processes`. All have the same cores,
and give the same answers, which is checked where no memory is drawn. Prints a table, then one JSON
line; see benchmarks/README.md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.speed.evaluation_ways import Case, Subject, Workers, rest
from benchmarks.speed.train import environment
from memdlm.cli.host_memory import keep_freed_memory
from memdlm.cli.quiet import silence_libraries

# What must hold: samples/s of ours at batch 16 over those of one request at a time.
REQUIRED_GAIN = 3.0


def bench(case: Case, batch_size: int, cores: int, repeats: int) -> dict[str, Any]:
    """Return the figures of one case."""
    subject, workers = Subject(case), Workers(case, cores, batch_size)
    runs: dict[str, Callable[[], list[str]]] = {
        "published": subject.published,
        "ours, batch 1": lambda: subject.ours(1),
        f"ours, batch {batch_size}": lambda: subject.ours(batch_size),
        f"ours, batch {batch_size}, {cores} processes": workers.answer,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    answers: dict[str, list[str]] = {}
    for turn in range(repeats + 1):  # they take turns; the first one warms up
        for name, run in runs.items():
            rest()
            since = time.perf_counter()
            answers[name] = run()
            if turn:
                seconds[name].append(time.perf_counter() - since)
    workers.stop()
    # The published way seeds its memories otherwise; ours give the same answers in any case.
    names = list(runs)[1:] if case.has_memory else list(runs)
    for name in names[1:]:
        assert answers[name] == answers[names[0]], f"{name} and {names[0]} answer differently"
    gains = {
        name: [a / b for a, b in zip(seconds["published"], taken, strict=True)]
        for name, taken in seconds.items()
    }
    return {
        **asdict(case),
        "num_new_tokens": subject.num_new_tokens,
        "batch_size": batch_size,
        "cores": cores,
        "seconds_all": seconds,
        "samples_per_second": {
            name: subject.num_requests / statistics.median(taken) for name, taken in seconds.items()
        },
        "gain": {name: statistics.median(values) for name, values in gains.items()},
        "gain_least": {name: min(values) for name, values in gains.items()},
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print a line per case."""
    header = ("family", "words", "memory", "new", "published/s", "batch 1", "batched", "processes")
    table = Table(*header, "least", title=f"ours / published; the goal is {REQUIRED_GAIN:g}x")
    for case in results:
        _, *gains = case["gain"].values()
        *_, least = case["gain_least"].values()
        table.add_row(
            case["family"],
            lengths(case),
            "on" if case["has_memory"] else "off",
            str(case["num_new_tokens"]),
            f"{case['samples_per_second']['published']:.2f}",
            *(f"{gain:.2f}x" for gain in gains),
            f"{least:.2f}x",
        )
    Console(width=110).print(table)
    for case in results:
        print(verdict(case))
    for family in dict.fromkeys(case["family"] for case in results):
        print(total([case for case in results if case["family"] == family], family))
    print(total(results, "all cases"))


def total(cases: list[dict[str, Any]], name: str) -> str:
    """Return in words what the cases take one after the other, the published way and ours."""
    published, ours = (
        sum(statistics.median(list(case["seconds_all"].values())[way]) for case in cases)
        for way in (0, -1)
    )
    return (
        f"{name}, {len(cases)} together: {published:.1f} s published, {ours:.1f} s ours: "
        f"{published / ours:.2f} x published"
    )


def lengths(case: dict[str, Any]) -> str:
    """Return the lengths of a case's prompts in words, `96+192`."""
    return "+".join(map(str, case["words"]))


def verdict(case: dict[str, Any]) -> str:
    """Return in words whether a case holds the goal."""
    *_, gain = case["gain"].values()
    memory = "with a memory" if case["has_memory"] else "without memory"
    holds = "holds" if gain >= REQUIRED_GAIN else "DOES NOT HOLD"
    return (
        f"{case['family']}, {lengths(case)} words, {memory}: {gain:.2f} x published "
        f"(at least {REQUIRED_GAIN:g}: {holds})"
    )


def main() -> None:
    """Measure every case asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--family",
        nargs="+",
        default=["quickstart", "llada_moe", "llada2"],
        help="tiny families, quickstart for the quickstart's start, or folders of trained models",
    )
    parser.add_argument("--words", nargs="+", type=int, default=[96, 192, 384])
    parser.add_argument(
        "--together", action="store_true", help="all lengths as tasks of one evaluation"
    )
    parser.add_argument("--memory", nargs="+", choices=("on", "off"), default=["off", "on"])
    parser.add_argument(
        "--budget", nargs="+", type=int, default=[0], help="new tokens; 0: the longest answer's"
    )
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="of every way; they must be idle")
    parser.add_argument("--json-out", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command line does; the published way gains by it too
    torch.set_num_threads(arguments.cores)
    silence_libraries()
    words = [tuple(arguments.words)] if arguments.together else [(n,) for n in arguments.words]
    chosen = product(arguments.family, words, arguments.memory, arguments.budget)
    results = [
        bench(
            Case(family, tasks, memory == "on", budget, arguments.num_samples),
            arguments.batch_size,
            arguments.cores,
            arguments.repeats,
        )
        for family, tasks, memory, budget in chosen
    ]
    show(results)
    record = {"environment": environment(torch.device("cpu")), "results": results}
    if arguments.json_out is not None:
        arguments.json_out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
