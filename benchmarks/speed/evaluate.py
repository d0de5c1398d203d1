"""Samples per second of an evaluation against one request at a time, the published way.

    python -m benchmarks.speed.evaluate                         # about five minutes on one thread
    python -m benchmarks.speed.evaluate --words 96 --memory off --budget 0
    python -m benchmarks.speed.evaluate --help

The published way: one request at a time; as many forwards as the task has tokens, logits at every
position; experts in a Python loop; LLaDA2.x without keys and values kept. Our own inner loop writes
its memories, which favours it. Ours: `DiffusionLM`, requests batched by length, logits at the
slots, experts in grouped products, the exact cache, rows left when they have ended. Both give the
same answers, which is checked where no memory is drawn. Prints a table, then one JSON line; see
benchmarks/README.md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.speed.train import environment
from memdlm.backbones import experts
from memdlm.backbones.tiny import build_tiny
from memdlm.cli.quiet import silence_libraries
from memdlm.evaluation.config import EvalConfig
from memdlm.evaluation.harness.model import DiffusionLM
from memdlm.evaluation.prepared import prepare
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.quickstart.start import load_start
from memdlm.sampling.config import SamplingConfig

# What must hold: samples/s of ours at batch 16 over those of one request at a time.
REQUIRED_GAIN = 3.0
TASK = "generated_variable_tracking"
# New tokens that RULER's variable tracking grants; answers here have eight and the end of text.
BUDGET = 30


@torch.no_grad()
def unmask_one_by_one(model: Any, prompt: torch.Tensor, num_new_tokens: int) -> torch.Tensor:
    """Return the answer [N] to one prompt [L]: LLaDA's greedy sampler, written plainly.

    Every step runs the whole canvas with logits everywhere and commits the slot whose best token is
    the most probable (low-confidence remasking, steps = block = N).
    """
    mask_id = model.config.mask_token_id
    canvas = torch.cat([prompt, prompt.new_full((num_new_tokens,), mask_id)])[None]
    for _ in range(num_new_tokens):
        logits = model(canvas).logits.float()
        logits[..., mask_id] = float("-inf")
        confidence, best = logits.softmax(-1).max(-1)
        confidence = confidence.masked_fill(canvas != mask_id, -1.0)
        place = int(confidence.argmax())
        canvas[0, place] = best[0, place]
    return canvas[0, len(prompt) :]


def one_by_one(
    lm: DiffusionLM, requests: list[Any], seeds: list[int], memory: MemoryConfig | None
) -> list[str]:
    """Answer requests the published way: one at a time, every step to the end."""
    model, tokenizer = lm.subject.model, lm.subject.tokenizer
    answers = []
    for request, seed in zip(requests, seeds, strict=True):
        text, arguments = request.args
        prompt = torch.tensor(lm.subject.encode(text))
        writer = None if memory is None else ParametricMemory(model, memory)
        if writer is None:
            tokens = unmask_one_by_one(model, prompt, arguments["max_gen_toks"])
        else:
            writer.write(prompt[None], seed=seed)
            with writer.attached():
                tokens = unmask_one_by_one(model, prompt, arguments["max_gen_toks"])
            writer.erase()
        ends = (tokens == tokenizer.eos_token_id).nonzero()
        kept = tokens[: int(ends[0])] if len(ends) else tokens
        answers.append(str(tokenizer.decode(kept, skip_special_tokens=True)))
    return answers


@contextmanager
def looped_experts() -> Iterator[None]:
    """Compute experts one after the other, as the published modelling code does."""
    grouped = experts.grouped_linear
    experts.grouped_linear = experts._looped_linear
    try:
        yield
    finally:
        experts.grouped_linear = grouped


def published_blocks(model: Any, tokenizer: Any, memory: MemoryConfig | None) -> DiffusionLM:
    """Return LLaDA2.x as it is published: blocks of 32, every block to its end, nothing kept."""
    sampling = SamplingConfig(cache="none", stop_early=False)
    return DiffusionLM(model, tokenizer, memory=memory, batch_size=1, sampling=sampling)


def with_budget(requests: list[Any], budget: int) -> list[Any]:
    """Return requests that grant `budget` new tokens; 0 leaves the longest answer and one."""
    for request in requests:
        text, arguments = request.args
        if budget:
            request.arguments = (text, {**arguments, "max_gen_toks": budget})
    return requests


def bench(
    family: str,
    words: int,
    has_memory: bool,
    budget: int,
    num_samples: int,
    batch_size: int,
    repeats: int,
) -> dict[str, Any]:
    """Return the figures of one case."""
    model, tokenizer = load_start()
    if family != "quickstart":
        model = build_tiny(family, tokenizer).eval()
    memory = MemoryConfig(learning_rate=0.02) if has_memory else None
    config = EvalConfig(tasks=(f"{TASK}@{words}",), num_samples=num_samples)
    requests = prepare(f"{TASK}@{words}", tokenizer, config, seed=0).requests
    requests = with_budget(requests, budget)

    def harness(size: int) -> DiffusionLM:
        return DiffusionLM(model, tokenizer, memory=memory, batch_size=size)

    def published() -> list[str]:
        with looped_experts():
            if family == "llada2":
                return published_blocks(model, tokenizer, memory).generate_until(requests)
            return one_by_one(harness(1), requests, list(range(len(requests))), memory)

    runs: dict[str, Callable[[], list[str]]] = {
        "published": published,
        "ours, batch 1": lambda: harness(1).generate_until(requests),
        f"ours, batch {batch_size}": lambda: harness(batch_size).generate_until(requests),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    answers: dict[str, list[str]] = {}
    for turn in range(repeats + 1):  # they take turns; the first one warms up
        for name, run in runs.items():
            since = time.perf_counter()
            answers[name] = run()
            if turn:
                seconds[name].append(time.perf_counter() - since)
    if not has_memory:  # the two seed their memories differently
        same = [a == b for a, b in zip(*list(answers.values())[::2], strict=True)]
        assert all(same), f"{same.count(False)} answers differ"
    gains = {
        name: [a / b for a, b in zip(seconds["published"], taken, strict=True)]
        for name, taken in seconds.items()
    }
    return {
        "family": family,
        "words": words,
        "memory": has_memory,
        "budget": requests[0].args[1]["max_gen_toks"],
        "num_samples": num_samples,
        "batch_size": batch_size,
        "seconds_all": seconds,
        "samples_per_second": {
            name: num_samples / statistics.median(taken) for name, taken in seconds.items()
        },
        "gain": {name: statistics.median(values) for name, values in gains.items()},
        "gain_least": {name: min(values) for name, values in gains.items()},
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print a line per case."""
    header = ("family", "words", "memory", "new", "published/s", "batch 1", "batched", "least")
    table = Table(*header, title=f"batched / published; the goal is {REQUIRED_GAIN:g}x")
    for case in results:
        _, alone, batched = case["gain"]
        table.add_row(
            case["family"],
            str(case["words"]),
            "on" if case["memory"] else "off",
            str(case["budget"]),
            f"{case['samples_per_second']['published']:.2f}",
            f"{case['gain'][alone]:.2f}x",
            f"{case['gain'][batched]:.2f}x",
            f"{case['gain_least'][batched]:.2f}x",
        )
    Console(width=100).print(table)


def main() -> None:
    """Measure every case asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", default=["quickstart", "llada_moe", "llada2"])
    parser.add_argument("--words", nargs="+", type=int, default=[96, 384])
    parser.add_argument("--memory", nargs="+", choices=("on", "off"), default=["off", "on"])
    parser.add_argument("--budget", nargs="+", type=int, default=[0, BUDGET])
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of both ways; 2 need idle cores")
    parser.add_argument("--json-out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    silence_libraries()
    cases = product(arguments.family, arguments.words, arguments.memory, arguments.budget)
    results = [
        bench(
            family,
            words,
            memory == "on",
            budget,
            arguments.num_samples,
            arguments.batch_size,
            arguments.repeats,
        )
        for family, words, memory, budget in cases
    ]
    show(results)
    record = {"environment": environment(torch.device("cpu")), "results": results}
    line = json.dumps(record)
    if arguments.json_out is not None:
        arguments.json_out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
