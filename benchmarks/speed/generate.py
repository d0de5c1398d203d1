"""Tokens per second and forwards per token of every way of decoding, and what a memory costs.

    python -m benchmarks.speed.generate              # all cases: some minutes on one thread
    python -m benchmarks.speed.generate --family llada2 --prompt 2048 --batch-size 1
    python -m benchmarks.speed.generate --help

Prints tables, then one JSON line. See benchmarks/README.md for what the numbers mean.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.speed.decoding import FAMILIES, REFERENCES, DecodeCase, DecodeWorkload, build_model
from benchmarks.speed.measuring import median_ratio, wait
from benchmarks.speed.memory_write import MOST_FORWARDS, write_cost
from benchmarks.speed.train import environment
from memdlm.memory.config import MemoryConfig
from memdlm.sampling.masked_decoding import DecodeOutput

# What must hold: tokens/s of 8 rows over those of one, in some way of decoding of the tiny model;
# and how much faster the exact cache answers a long prompt.
REQUIRED_BATCH_GAIN = 2.5
REQUIRED_CACHE_GAIN = 5.0
PROMPTS, BATCH_SIZES = (256, 2048), (1, 8)

Key = TypeVar("Key")


def take_turns(
    runs: Mapping[Key, Callable[[], object]], repeats: int, patience: float, device: torch.device
) -> dict[Key, list[float]]:
    """Return the seconds of every run of each; the first is a warm-up if another follows.

    They take turns, so that a machine that slows down slows all of them, and all take equally many:
    `repeats` after the warm-up, or as many as start within `patience` seconds.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for turn in range(repeats + 1):
        if turn > 0 and time.perf_counter() - begin > patience:
            break
        for name, run in runs.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] or values for name, values in seconds.items()}


def bench(
    cases: list[DecodeCase],
    num_new_tokens: int,
    repeats: int,
    patience: float,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Return the figures of cases that differ in their batch size only; all take turns."""
    workloads = [DecodeWorkload(case, num_new_tokens, device) for case in cases]
    outputs: dict[tuple[int, str], DecodeOutput] = {}

    def remember(key: tuple[int, str], run: Callable[[], DecodeOutput]) -> Callable[[], None]:
        return lambda: outputs.update({key: run()})

    runs = {
        (index, name): remember((index, name), run)
        for index, workload in enumerate(workloads)
        for name, run in workload.modes()
    }
    seconds = take_turns(runs, repeats, patience, device)
    results = []
    for index, workload in enumerate(workloads):
        names = [name for place, name in outputs if place == index]
        modes = {}
        for name in names:
            output, taken = outputs[index, name], seconds[index, name]
            num_tokens = sum(len(tokens) for tokens in output.tokens)
            alone = seconds[0, name]
            gains = [
                workload.case.batch_size / cases[0].batch_size * a / b
                for a, b in zip(alone, taken, strict=True)
            ]
            modes[name] = {
                "num_forwards": output.num_forwards,
                "forwards_per_token": output.num_forwards / num_new_tokens,
                "seconds_all": taken,
                "tokens_per_second": num_tokens / statistics.median(taken),
                "batch_gain": statistics.median(gains),
                "batch_gain_least": min(gains),
            }
            if name in REFERENCES:
                reference = index, REFERENCES[name]
                modes[name] |= _against(output, taken, outputs[reference], seconds[reference])
        result = {"case": asdict(workload.case), "modes": modes}
        if workload.case.memory:
            result["write"] = _write_figures(workload, repeats, patience, device)
        results.append(result)
    return results


def _against(
    output: DecodeOutput, seconds: list[float], reference: DecodeOutput, theirs: list[float]
) -> dict[str, float]:
    """Return what a cache gains over the reference without one, and how many tokens are equal."""
    equal = torch.cat(
        [ours == other for ours, other in zip(output.tokens, reference.tokens, strict=True)]
    )
    gains = [a / b for a, b in zip(theirs, seconds, strict=True)]
    return {
        "speedup": statistics.median(gains),
        "speedup_least": min(gains),
        "same_tokens": float(equal.float().mean()),
    }


def _write_figures(
    workload: DecodeWorkload, repeats: int, patience: float, device: torch.device
) -> dict[str, Any]:
    """Return what writing the memory of the prompts takes, in forwards of them."""
    case = workload.case
    runs = {"write": workload.write, "forward": workload.forward}
    seconds = take_turns(runs, repeats, patience, device)
    # In bfloat16, the only type that grouped products have on the meta device.
    on_meta = build_model(case.family, case.prompt, torch.device("meta")).to(torch.bfloat16)
    flops = write_cost(on_meta, case.prompt, MemoryConfig())
    return {
        "seconds_all": seconds,
        "seconds": statistics.median(seconds["write"]),
        "seconds_in_forwards": median_ratio(seconds["write"], seconds["forward"]),
        "flops_in_forwards": flops["write"] / flops["forward"],
    }


def verdicts(results: list[dict[str, Any]]) -> list[str]:
    """Return a line on each thing that must hold and was measured."""
    lines = []
    gains = {
        f"{name}, {_where(DecodeCase(**result['case']))}": mode["batch_gain"]
        for result in results
        for name, mode in result["modes"].items()
        if result["case"]["batch_size"] > 1
    }
    if gains:
        name, gain = max(gains.items(), key=lambda item: item[1])
        lines.append(
            f"best gain of a batch: {gain:.2f} x the tokens/s of one row ({name}; at least "
            f"{REQUIRED_BATCH_GAIN}): {_says(gain >= REQUIRED_BATCH_GAIN)}"
        )
    for result in results:
        case = DecodeCase(**result["case"])
        exact = result["modes"].get("block decoding, exact cache")
        # Below, fixed costs of a forward and a write outweigh what depends on the prompt.
        is_long = case.prompt >= max(PROMPTS)
        if exact is not None and is_long:
            holds = exact["speedup"] >= REQUIRED_CACHE_GAIN and exact["same_tokens"] == 1
            lines.append(
                f"exact cache, {_where(case)}: {exact['speedup']:.1f} x faster (at least "
                f"{REQUIRED_CACHE_GAIN:.0f}), {exact['same_tokens']:.0%} of the tokens the same: "
                f"{_says(holds)}"
            )
        if write := result.get("write"):
            in_time, in_flops = write["seconds_in_forwards"], write["flops_in_forwards"]
            holds = in_flops <= MOST_FORWARDS and (in_time <= MOST_FORWARDS or not is_long)
            lines.append(
                f"write, {case.family}, {_where(case)}: {in_flops:.2f} forwards in FLOPs, "
                f"{in_time:.2f} in time (at most {MOST_FORWARDS}"
                f"{'' if is_long else ' in FLOPs'}): {_says(holds)}"
            )
    return lines


def _where(case: DecodeCase) -> str:
    return f"{case.batch_size} x {case.prompt} tokens{', memory' * case.memory}"


def _says(holds: bool) -> str:
    return "holds" if holds else "MISSED"


def render(results: list[dict[str, Any]]) -> Table:
    """Return the table of `results`; x uncached is the gain over the same decoding uncached."""
    table = Table(title="Decoding; tokens/s of all rows together")
    columns = "case", "mode", "forwards/token", "tokens/s", "x one row", "x uncached", "same tokens"
    for name in columns:
        table.add_column(name, justify="left" if name in ("case", "mode") else "right")
    for result in results:
        case = DecodeCase(**result["case"])
        for index, (name, mode) in enumerate(result["modes"].items()):
            is_cached = "speedup" in mode
            table.add_row(
                _where(case) if index == 0 else "",
                name,
                f"{mode['forwards_per_token']:.2f}",
                f"{mode['tokens_per_second']:.1f}",
                f"{mode['batch_gain']:.2f}" if case.batch_size > 1 else "",
                f"{mode['speedup']:.1f}" if is_cached else "",
                f"{mode['same_tokens']:.0%}" if is_cached else "",
                end_section=index == len(result["modes"]) - 1,
            )
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; options left out take all values of the default suite."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.generate",
        description=__doc__.partition("\n")[0] if __doc__ else None,
    )
    parser.add_argument("--family", choices=FAMILIES, help="Default: both.")
    parser.add_argument("--prompt", type=int, help="Tokens of a prompt (default: 256 and 2048).")
    parser.add_argument("--batch-size", type=int, help="Prompts together (default: 1 and 8).")
    parser.add_argument("--memory", choices=("on", "off"), help="Default: both.")
    parser.add_argument("--new-tokens", type=int, default=16, help="Of an answer (default: 16).")
    parser.add_argument("--repeats", type=int, default=5, help="Timed repeats (default: 5).")
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        help="Seconds after which no repeat of a case "
        "begins (default: 60); each mode runs at least once.",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1).")
    parser.add_argument("--json-out", type=Path, help="Also write the JSON line to this file.")
    options = parser.parse_args(arguments)
    for name in ("prompt", "batch_size", "new_tokens", "repeats", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1")
    if options.new_tokens % 8:
        parser.error(f"--new-tokens: {options.new_tokens} is no multiple of the blocks of 8")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: this torch sees no CUDA device; use --device cpu")
    return options


def suite(options: argparse.Namespace) -> list[list[DecodeCase]]:
    """Return the cases to run, in groups that differ in their batch size only."""
    memories = (False, True) if options.memory is None else (options.memory == "on",)
    sizes = BATCH_SIZES if options.batch_size is None else (options.batch_size,)
    return [
        [DecodeCase(family, prompt, memory, batch_size) for batch_size in sizes]
        for prompt, memory, family in product(
            PROMPTS if options.prompt is None else (options.prompt,),
            memories,
            FAMILIES if options.family is None else (options.family,),
        )
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print tables and JSON line."""
    options = parse(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    where = environment(device)  # before anything runs: the checkout may move on meanwhile
    results = []
    for cases in suite(options):
        for case in cases:
            console.print(f"measuring {case.family}, {_where(case)}", style="dim")
        results += bench(cases, options.new_tokens, options.repeats, options.patience, device)
    Console(width=None if Console().is_terminal else 140).print(render(results))
    for line in verdicts(results):
        print(line)
    record = {
        "benchmark": "speed/generate",
        **where,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "results": results,
    }
    text = json.dumps(record)
    print(text)
    if options.json_out is not None:
        options.json_out.parent.mkdir(parents=True, exist_ok=True)
        options.json_out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
