"""`memdlm plan`: what training a recipe needs, before anything is downloaded or started."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from memdlm.cli.planning_run import Remedy
    from memdlm.planning.gpus import Gpu
    from memdlm.planning.plan import Plan

_GIB = 2**30


def plan(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML); see `memdlm recipe`.")
    ],
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. adapter.kind=lora."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", help="Tokens of a row; the recipe's data.max_length if left out."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", help="Rows of a micro-batch; the recipe's if left out."),
    ] = None,
    response: Annotated[
        int | None,
        typer.Option(
            "--response", help="Response tokens of a row; all but one if left out, the worst case."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Say whether it fits: a name such as a100-80gb, or GiB."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what training RECIPE needs: parameters, memory by part, FLOPs of a step.

    Needs no weights: of the model only config.json is read. Exits with 1 if it does not fit --gpu.
    """
    from memdlm.cli.quiet import silence_libraries

    silence_libraries()

    from memdlm.cli.planning_run import plan_recipe, remedies
    from memdlm.cli.recipe import load_recipe
    from memdlm.planning.gpus import find_gpu

    card = None if gpu is None else find_gpu(gpu)
    settings = list(assignments or ())
    if length is not None:
        settings.append(f"data.max_length={length}")
    if batch is not None:
        settings.append(f"training.per_device_train_batch_size={batch}")
    planned = plan_recipe(load_recipe(recipe, settings), response)
    fits = card is None or card.margin(planned.step.peak_bytes) >= 0
    found = [] if card is None or fits else list(remedies(recipe, settings, card, response))
    if as_json:
        print(json.dumps(_as_json(planned, card, found)))
    else:
        _show(planned, card, found)
    if not fits:
        raise typer.Exit(1)


def _as_json(planned: "Plan", card: "Gpu | None", found: "list[Remedy]") -> dict[str, Any]:
    result = planned.to_dict()
    if card is not None:
        margin = card.margin(planned.step.peak_bytes)
        result["gpu"] = {
            "name": card.name,
            "memory": card.memory,
            "margin": margin,
            "fits": margin >= 0,
            "remedies": [
                {"set": list(remedy.assignments), "peak": remedy.peak, "fits": remedy.fits}
                for remedy in found
            ],
        }
    return result


def _show(planned: "Plan", card: "Gpu | None", found: "list[Remedy]") -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    for line in _description(planned):
        console.print(line)
    console.print(_memory_table(planned))
    micro = "" if planned.micro_batches == 1 else f" of {planned.micro_batches} micro-batches"
    console.print(f"FLOPs     {_count(planned.step.flops)} an optimizer step{micro}")
    if card is None:
        return
    margin = card.margin(planned.step.peak_bytes)
    verdict = "fits" if margin >= 0 else "does not fit"
    rest = f"{margin / _GIB:.2f} GiB left" if margin >= 0 else f"{-margin / _GIB:.2f} GiB missing"
    console.print(f"{card.name}: {verdict} in {card.memory / _GIB:.1f} GiB, {rest}")
    for remedy in found:
        flags = " ".join(f"--set {assignment}" for assignment in remedy.assignments)
        outcome = "fits" if remedy.fits else "does not fit"
        console.print(f"  {outcome}, peak {remedy.peak / _GIB:.2f} GiB: {flags}")


def _description(planned: "Plan") -> list[str]:
    sizes, step = planned.sizes, planned.step
    autocast = f"{planned.autocast} autocast" if planned.autocast else "no autocast"
    checkpointing = "on" if planned.gradient_checkpointing else "off"
    stored = "" if planned.quantization == "none" else f" and {planned.quantization}"
    active = _count(sizes.active)
    if sizes.active < sizes.total:
        active += f" ({_count(sizes.active_beyond_table)} beyond the embedding table)"
    fast = "none"
    if step.num_memories:
        fast = f"{_count(step.num_fast)} in each of {step.num_memories} memories"
    return [
        f"{planned.model}: {planned.dtype} weights{stored}, {autocast}, gradient checkpointing "
        f"{checkpointing}",
        f"batch     {planned.batch_size} x {planned.length:,} tokens, {planned.response:,} of each "
        "row masked; one device, no sharding",
        f"total     {_count(sizes.total)} parameters",
        f"active    {active} a token",
        f"trained   {_count(sizes.trained)}",
        f"fast      {fast}",
    ]


def _memory_table(planned: "Plan") -> Any:
    from rich import box
    from rich.table import Table

    from memdlm.planning.gpus import reserve

    peak = planned.step.peak_bytes
    # Of a tiny network every part would read 0.00 GiB.
    unit, name, digits = (_GIB, "GiB", 2) if peak >= _GIB else (2**20, "MiB", 1)

    def shown(size: int) -> str:
        return f"{size / unit:,.{digits}f}"

    table = Table(f"memory, {name}", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("at the peak", "at most"):
        table.add_column(name, justify="right")
    for part, size in planned.step.peak.items():
        if most := planned.step.largest[part]:
            table.add_row(part.replace("_", " "), shown(size), shown(most))
    table.add_section()
    table.add_row("all tensors", shown(peak), "")
    table.add_row("reserve (CUDA context, fragmentation)", shown(reserve(peak)), "")
    return table


def _count(number: float) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:.0f}"
