"""Time and peak memory of grouped experts with their deltas, against a plain loop.

    python -m benchmarks.speed.experts
    python -m benchmarks.speed.experts --help

Checks first that both give the same output and gradients. Prints a table, then one JSON line. See
benchmarks/README.md for what the numbers mean.
"""

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.speed.expert_layer import PARTS, ROUTINGS, ExpertLayer, Shape
from benchmarks.speed.measuring import median_ratio, peak_bytes, time_interleaved
from benchmarks.speed.train import environment

TOLERANCE = 1e-5
"""Largest difference between the two, relative to the norm of the tensor, in float32."""

VARIANTS = ("grouped", "loop")

SUITE = (
    Shape(num_experts=8, top_k=2),
    Shape(num_experts=64, top_k=8),
    Shape(num_experts=64, top_k=8, routing="even"),
    Shape(num_experts=64, top_k=8, rows=1, length=1024),
    Shape(num_experts=256, top_k=8, width=128, inner=64),
)


@dataclass(frozen=True)
class Difference:
    """The largest difference between grouped products and the loop, and where it is."""

    value: float
    where: str


def compare(layer: ExpertLayer) -> Difference:
    """Return how far output and gradients of the two ways lie apart, relative to their norms."""
    grouped, loop = (layer.named(variant) for variant in VARIANTS)
    assert grouped.keys() == loop.keys()
    worst = Difference(0.0, "nowhere")
    for name, expected in loop.items():
        norm = float(expected.norm())
        value = float((grouped[name] - expected).norm()) / norm if norm > 0 else 0.0
        if value > worst.value:
            worst = Difference(value, name)
    return worst


def measure(
    shape: Shape, parts: str, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Return all figures of one shape with the deltas named by `parts`.

    Raises:
        AssertionError: The two ways differ by more than `TOLERANCE`, checked in float32.
    """
    layer = ExpertLayer(shape, parts, device, torch.float32)
    difference = compare(layer)
    assert difference.value <= TOLERANCE, f"{shape}, {parts}: {difference}"
    if dtype != torch.float32:
        layer = ExpertLayer(shape, parts, device, dtype)
    runs = {variant: partial(layer.run, variant) for variant in VARIANTS}
    seconds = time_interleaved(runs, repeats, device)
    peaks = {variant: peak_bytes(run, device) for variant, run in runs.items()}
    return {
        "shape": asdict(shape),
        "parts": parts,
        "dtype": str(dtype).removeprefix("torch."),
        "load": layer.load(),
        "difference": asdict(difference),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds_least": {name: min(values) for name, values in seconds.items()},
        "seconds_all": seconds,
        "seconds_ratio": median_ratio(seconds["grouped"], seconds["loop"]),
        "peak_bytes": peaks,
        "peak_bytes_ratio": peaks["grouped"] / peaks["loop"],
    }


def render(results: list[dict[str, Any]]) -> Table:
    """Return the table of `results`; ratios are the grouped products' to the loop's."""
    table = Table(title="One layer of experts (forward and backward); x = grouped / loop")
    for name in ("shape", "deltas", "difference", "grouped s", "loop s", "x", "MiB", "loop MiB"):
        table.add_column(name, justify="left" if name in ("shape", "deltas") else "right")
    table.add_column("x", justify="right")
    for index, result in enumerate(results):
        is_first = index == 0 or results[index - 1]["shape"] != result["shape"]
        is_last = index + 1 == len(results) or results[index + 1]["shape"] != result["shape"]
        table.add_row(
            Shape(**result["shape"]).title() if is_first else "",
            result["parts"],
            f"{result['difference']['value']:.0e}",
            *(f"{result['seconds'][name]:.4f}" for name in VARIANTS),
            f"{result['seconds_ratio']:.2f}",
            *(f"{result['peak_bytes'][name] / 2**20:.1f}" for name in VARIANTS),
            f"{result['peak_bytes_ratio']:.2f}",
            end_section=is_last,
        )
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; without a shape's options the default suite runs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.experts", description=__doc__.partition("\n")[0]
    )
    for entry in fields(Shape):
        parser.add_argument(
            f"--{entry.name.replace('_', '-')}",
            type=type(entry.default),
            choices=ROUTINGS if entry.name == "routing" else None,
            help=f"{entry.metadata['help']} With none of these options: the default suite.",
        )
    parser.add_argument("--parts", choices=PARTS, help="One kind of deltas only.")
    parser.add_argument("--repeats", type=int, default=7, help="Timed repeats (default: 7).")
    parser.add_argument("--device", default="cpu", help="cpu (default; float32) or cuda (bf16).")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1).")
    parser.add_argument("--json-out", type=Path, help="Also write the JSON line to this file.")
    options = parser.parse_args(arguments)
    for name in (*(entry.name for entry in fields(Shape)), "repeats", "threads"):
        value = getattr(options, name)
        if isinstance(value, int) and value < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1")
    for shape in suite(options):
        if shape.top_k > shape.num_experts - (shape.routing == "uneven"):
            parser.error(
                f"--top-k: {shape.top_k} of {shape.num_experts} experts are too many; "
                "uneven routing leaves out one"
            )
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: this torch sees no CUDA device; use --device cpu")
    return options


def suite(options: argparse.Namespace) -> tuple[Shape, ...]:
    """Return the shapes to run."""
    given = {f.name: value for f in fields(Shape) if (value := getattr(options, f.name))}
    return (Shape(**given),) if given else SUITE


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print table and JSON line."""
    options = parse(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    where = environment(device)  # before anything runs: the checkout may move on meanwhile
    results = []
    for shape in suite(options):
        for parts in (options.parts,) if options.parts else PARTS:
            console.print(f"measuring {shape.title()}, {parts}", style="dim")
            results.append(measure(shape, parts, device, dtype, options.repeats))
    Console(width=None if Console().is_terminal else 140).print(render(results))
    record = {"benchmark": "speed/experts", **where, "repeats": options.repeats, "results": results}
    text = json.dumps(record)
    print(text)
    if options.json_out is not None:
        options.json_out.parent.mkdir(parents=True, exist_ok=True)
        options.json_out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
