"""Time, peak memory, FLOPs and MFU of one training step: MDLM, MemDLM and a naive MemDLM.

    python -m benchmarks.speed.train                  # what `make bench` runs
    python -m benchmarks.speed.train --meta           # FLOPs at real shapes only, seconds
    python -m benchmarks.speed.train --help

Prints a table, then one JSON line. See benchmarks/README.md for what the numbers mean.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.speed.flops import count_flops
from benchmarks.speed.measuring import median_ratio, peak_bytes, time_interleaved
from benchmarks.speed.workload import FAMILIES, SIZES, TUNINGS, VARIANTS, Case, Workload
from memdlm.memory.config import PRE_ANCHOR_PREFIXES

# What a MemDLM step may cost at LLaDA-MoE's real shapes, 4096 tokens, 10 % response, LoRA.
REQUIRED = {"mdlm": 1.70, "naive": 0.60}
REQUIRED_CASE = Case(family="moe", size="real", tuning="lora", length=4096)

# What was aimed at where a case is measured with a tenth of its tokens as response: MemDLM relative
# to MDLM and to the naive step. On a GPU, the least MFU of Standard MDLM at real shapes.
GOALS = {
    ("seconds_ratio", "mdlm"): 1.70,
    ("seconds_ratio", "naive"): 1 / 1.70,
    ("peak_bytes_ratio", "mdlm"): 1.15,
}
GOAL_MFU = 0.35
# TFLOP/s in bfloat16 without sparsity, from the maker's data sheets.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}

_LABELS = {"mdlm": "Standard MDLM", "memdlm": "MemDLM", "naive": "naive MemDLM"}
_META = torch.device("meta")


def flops_of(case: Case) -> dict[str, int]:
    """Return the FLOPs of one step of every variant, in bf16 on the meta device."""
    workload = Workload.build(case, _META, torch.bfloat16)
    return {name: count_flops(partial(workload.run, name)) for name in VARIANTS}


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return seconds and peak bytes of every variant of `case`, measured on `device`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    workload = Workload.build(case, device, dtype)
    runs = {name: partial(workload.run, name) for name in VARIANTS}
    seconds = time_interleaved(runs, repeats, device)
    peaks = {}
    for name, run in runs.items():
        workload.model.zero_grad(set_to_none=True)
        peaks[name] = peak_bytes(run, device)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds_all": seconds,
        "seconds_ratio": {
            name: median_ratio(seconds["memdlm"], seconds[name]) for name in REQUIRED
        },
        "peak_bytes": peaks,
        "peak_bytes_ratio": {name: peaks["memdlm"] / peaks[name] for name in REQUIRED},
    }


def bench(
    case: Case,
    device: torch.device,
    repeats: int,
    is_meta: bool,
    peak_tflops: float | None = None,
) -> dict[str, Any]:
    """Return all figures of one case: FLOPs always, the rest unless `is_meta`.

    With `peak_tflops`, what the device could do, the share of it that every variant's own FLOPs
    make up in its seconds is `mfu`.
    """
    flops = flops_of(case)
    result = {
        "case": asdict(case),
        "flops": flops,
        "flops_ratio": {name: flops["memdlm"] / flops[name] for name in REQUIRED},
    }
    if is_meta:
        return result
    result |= measure(case, device, repeats)
    if peak_tflops is not None:
        seconds = result["seconds"]
        result["mfu"] = {n: flops[n] / seconds[n] / peak_tflops / 1e12 for n in VARIANTS}
    return result


def peak_tflops_of(device: torch.device) -> float | None:
    """Return the bfloat16 TFLOP/s of `device` where they are known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAK_TFLOPS.items() if part in name), None)


def title(case: Case) -> str:
    """Return `case` in a few words."""
    return (
        f"{case.family} {case.size} {case.tuning}, {case.batch_size} x {case.length} tokens, "
        f"{case.response:.0%} response, t = {case.mask_ratio}"
        f"{'' if case.prefix == 'exact' else f', {case.prefix}'}"
    )


def render(results: list[dict[str, Any]]) -> Table:
    """Return the table of `results`; ratios are MemDLM's to the row's variant."""
    table = Table(title="One training step (forward and backward); x = MemDLM relative to this row")
    has_mfu = any("mfu" in result for result in results)
    columns = ["case", "variant", "TFLOPs", "x", "seconds", "x", "peak MiB", "x"]
    for name in [*columns, "MFU"] if has_mfu else columns:
        table.add_column(name, justify="left" if name in ("case", "variant") else "right")
    for result in results:
        case = Case(**result["case"])
        for name in VARIANTS:
            cells = [title(case) if name == "mdlm" else "", _LABELS[name]]
            for key, scale, digits in (
                ("flops", 1e12, 4),
                ("seconds", 1, 3),
                ("peak_bytes", 2**20, 0),
            ):
                is_known = key in result
                cells.append(f"{result[key][name] / scale:.{digits}f}" if is_known else "-")
                ratios = result.get(f"{key}_ratio", {})
                cells.append(f"{ratios[name]:.2f}" if name in ratios else "")
            if has_mfu:
                cells.append(f"{result['mfu'][name]:.1%}" if "mfu" in result else "-")
            table.add_row(*cells, end_section=name == VARIANTS[-1])
    return table


def verdict(results: list[dict[str, Any]]) -> str | None:
    """Return one line on whether the required case costs what it may; None if it did not run."""
    for result in results:
        if Case(**result["case"]) == REQUIRED_CASE:
            ratios = result["flops_ratio"]
            holds = all(ratios[name] <= limit for name, limit in REQUIRED.items())
            return (
                "LLaDA-MoE, 4096 tokens, 10 % response, LoRA: "
                f"{ratios['mdlm']:.2f} x MDLM (at most {REQUIRED['mdlm']:.2f}), "
                f"{ratios['naive']:.2f} x naive (at most {REQUIRED['naive']:.2f}): "
                f"{'holds' if holds else 'MISSED'}"
            )
    return None


def goals(result: dict[str, Any]) -> str | None:
    """Return one line on what was aimed at; None for a case that was not measured or is another."""
    case = Case(**result["case"])
    if "seconds" not in result or case.response != 0.1:
        return None
    found = [
        (f"{key.removesuffix('_ratio')} / {name}", result[key][name], limit)
        for (key, name), limit in GOALS.items()
    ]
    parts = [
        f"{what} {value:.2f} (at most {limit:.2f}: {'holds' if value <= limit else 'MISSED'})"
        for what, value, limit in found
    ]
    if "mfu" in result and case.size == "real":
        mfu = result["mfu"]["mdlm"]
        holds = "holds" if mfu >= GOAL_MFU else "MISSED"
        parts.append(f"MFU of MDLM {mfu:.0%} (at least {GOAL_MFU:.0%}: {holds})")
    return f"{case.family} {case.size}, {case.length} tokens: {'; '.join(parts)}"


def environment(device: torch.device) -> dict[str, Any]:
    """Return machine, versions and commit, so that a number can be traced."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "HEAD"),
        "is_dirty": bool(_git("status", "--porcelain", "--", "src", "benchmarks/**/*.py")),
        "machine": {
            "system": platform.system(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft")},
        },
    }


def _processor() -> str:
    """Return the processor's name, family and model: a name such as AMD EPYC says little."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in info.read_text(encoding="utf-8").splitlines())
    first: dict[str, str] = {}
    for name, _, value in pairs:
        first.setdefault(name.strip(), value.strip())
    kind = ", ".join(f"{name} {first[name]}" for name in ("cpu family", "model") if name in first)
    return f"{first.get('model name') or platform.machine()}{f' ({kind})' if kind else ''}"


def _git(*args: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; options left out take the default suite's values."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.train", description=__doc__.partition("\n")[0]
    )
    choices = {
        "family": FAMILIES,
        "size": SIZES,
        "tuning": TUNINGS,
        "sharing": ("sequence", "batch"),
        "prefix": PRE_ANCHOR_PREFIXES,
    }
    for entry in fields(Case):
        parser.add_argument(
            f"--{entry.name.replace('_', '-')}",
            type=type(entry.default),
            nargs="+" if entry.name == "length" else None,
            choices=choices.get(entry.name),
            help=f"{entry.metadata['help']} With none of these options: the default suite.",
        )
    parser.add_argument("--repeats", type=int, default=5, help="Timed repeats (default: 5).")
    parser.add_argument("--meta", action="store_true", help="Count FLOPs only; measure nothing.")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda.")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads (default: 1, repeatable when shared)."
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="TFLOP/s of the device in bfloat16, for the MFU (default: known for "
        f"{', '.join(PEAK_TFLOPS)}).",
    )
    parser.add_argument("--json-out", type=Path, help="Also write the JSON line to this file.")
    options = parser.parse_args(arguments)
    for name in ("length", "batch_size", "repeats", "threads"):
        value = getattr(options, name)
        values = value if isinstance(value, list) else [value]
        if any(number is not None and number < 1 for number in values):
            parser.error(f"--{name.replace('_', '-')}: must be at least 1")
    for name in ("response", "mask_ratio"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= 1:
            parser.error(f"--{name.replace('_', '-')}: must be in (0, 1]")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: this torch sees no CUDA device; use --device cpu")
    return options


def suite(options: argparse.Namespace) -> list[tuple[Case, bool]]:
    """Return the cases to run, each with whether only its FLOPs are counted."""
    given = {
        entry.name: getattr(options, entry.name)
        for entry in fields(Case)
        if getattr(options, entry.name) is not None
    }
    if given:
        lengths = given.pop("length", [Case.length])
        cases = [Case(**given, length=length) for length in lengths]
        # Real shapes do not fit a laptop: without an accelerator they are counted, not run.
        return [(c, options.meta or (c.size == "real" and options.device == "cpu")) for c in cases]
    real = [
        (replace(REQUIRED_CASE, family=family, tuning=tuning), True)
        for family in reversed(FAMILIES)
        for tuning in TUNINGS
    ]
    small = [
        (Case(family=family, length=length), False)
        for family in reversed(FAMILIES)
        for length in (512, 1024)
    ]
    return real if options.meta else real + small


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print table and JSON line."""
    options = parse(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    where = environment(device)  # before anything runs: the checkout may move on meanwhile
    peak_tflops = options.peak_tflops or peak_tflops_of(device)
    results = []
    for case, is_meta in suite(options):
        console.print(f"{'counting' if is_meta else 'measuring'} {title(case)}", style="dim")
        results.append(bench(case, device, options.repeats, is_meta, peak_tflops))
    Console(width=None if Console().is_terminal else 140).print(render(results))
    if (line := verdict(results)) is not None:
        print(line)
    for line in filter(None, map(goals, results)):
        print(line)
    record = {
        "benchmark": "speed/train",
        **where,
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
