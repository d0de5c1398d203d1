"""The work of `memdlm memory`: write a text into a folder, and tell what a folder holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memdlm.cli.generation_run import GenerationRequest, generation_config, load
from memdlm.cli.run_folder import RunFolder
from memdlm.data.encoding import encode_prompt
from memdlm.errors import CheckpointError, DataError, NonFiniteError, UsageError
from memdlm.memory.artefact import Artefact
from memdlm.memory.inspection import describe
from memdlm.memory.parametric_memory import ParametricMemory

_MOST_EXPERTS_SHOWN = 16


def write_memory(request: GenerationRequest, output: Path) -> str:
    """Write the one prompt of a request into the folder `output`; return what to print."""
    if len(request.prompts) != 1:
        raise UsageError(
            f"a memory holds one text, but the file has {len(request.prompts)} prompts: write them "
            "one by one"
        )
    if output.exists():  # before minutes go into loading a model
        raise CheckpointError(f"{output} exists: choose another place for the memory, or delete it")
    run = RunFolder(Path(request.model).expanduser())
    config = generation_config(request, run)
    model, tokenizer = load(request, run)
    ids = encode_prompt(tokenizer, request.prompts[0], chat_template=request.chat_template)
    if not ids:
        raise DataError("the text is empty: give it at least one word")
    settings = config.memory
    if settings.sharing == "global_batch":  # of training; here one text is the whole batch
        settings = replace(settings, sharing="batch")
    memory = ParametricMemory(model, settings, config.objective)
    memory.write(torch.tensor([ids]), seed=request.seed)
    (row,) = memory.rows
    assert row is not None
    if row.is_dropped:
        raise NonFiniteError(
            "the inner loop met inf or nan, so nothing was kept; lower memory.learning_rate"
        )
    memory.save_pretrained(output)
    return f"wrote {row.num_tokens:,} tokens in {_chunks(row.num_chunks)}; saved {output}"


def show_memory(folder: Path, as_json: bool) -> str:
    """Return what a memory folder holds, for people or as one JSON object."""
    described = describe(Artefact.load(folder))
    if as_json:
        return json.dumps({"folder": str(folder), **described}, ensure_ascii=False)
    base = described["base"]
    lines = [
        f"memory      {folder}",
        f"base        {base['name'] or 'unnamed'} ({base['architecture']}, "
        f"{base['fingerprint'][:12]})",
        f"adapter     {base['adapter'][:12] if base['adapter'] else 'none'}",
        f"size        {described['bytes']:,} bytes",
        f"settings    {_settings(described['settings']['memory'])}",
    ]
    for number, row in enumerate(described["rows"]):
        hashes = ", ".join(prompt["sha256"][:12] for prompt in row["prompts"])
        dropped = "; dropped: no effect" * row["is_dropped"]
        lines += [
            f"row {number}       {row['num_tokens']:,} tokens in {_chunks(row['num_chunks'])}, "
            f"seed {row['seed']}, prompt {hashes}{dropped}",
            f"  norm      {row['norm']:.4g}",
        ]
        lines += [line for layer in row["layers"] for line in _layer_lines(layer)]
    return "\n".join(lines)


def _chunks(number: int) -> str:
    return "1 chunk" if number == 1 else f"{number} chunks"


def _settings(memory: dict[str, Any]) -> str:
    shown = ("kind", "rank", "alpha", "scope", "layer_fraction", "num_steps", "learning_rate")
    return ", ".join(f"{name} {memory[name]}" for name in shown)


def _layer_lines(layer: dict[str, Any]) -> list[str]:
    lines = [f"  layer {layer['layer']:<4}{layer['norm']:.4g}"]
    for path, stack in layer["experts"].items():
        written = [str(expert) for expert in stack["written"]]
        shown = ", ".join(written[:_MOST_EXPERTS_SHOWN]) + ", ..." * (
            len(written) > _MOST_EXPERTS_SHOWN
        )
        where = path.split(".", 2)[2]
        lines.append(
            f"    {where}: {len(written)} of {stack['num_experts']} written"
            + (f" ({shown})" if written else "")
        )
    return lines
