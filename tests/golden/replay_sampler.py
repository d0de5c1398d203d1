"""Replay of `sampler/<sampler>/<case>`: decodes and unmasking order of the published samplers.

A new sampler is one function and one row of `SAMPLERS`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import replay_blocks
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from memdlm.backbones.loading import load_model
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode
from memdlm.sampling.masked_decoding import DecodeOutput
from memdlm.sampling.token_choice import Draw

Tensors = dict[str, Tensor]


def replay(folder: Path) -> dict[str, float]:
    """Return how many tokens, steps and forwards differ from those of the case in `folder`."""
    meta = json.loads((folder / "meta.json").read_text())
    model = load_model(str(folder.parent.parent.parent / meta["model"]))
    # Official configs do not all name these; a tokenizer does, and here the recorded decode.
    model.config.mask_token_id = meta["mask_token_id"]
    model.config.eos_token_id = meta.get("eos_token_id", model.config.eos_token_id)
    return SAMPLERS[folder.parent.name](model, meta, load_file(folder / "tensors.safetensors"))


def llada_official(model: nn.Module, meta: dict[str, Any], case: Tensors) -> dict[str, float]:
    """Replay a decode of LLaDA's `generate.py`.

    Its prompts are padded on the left; ours are stripped and padded on the right. Rotary positions
    are relative, so the answers must be the same.
    """
    args = meta["args"]
    config = SamplingConfig(
        max_new_tokens=args["gen_length"],
        num_unmasking_steps=args["steps"],
        block_length=args["block_length"],
        guidance_scale=args["cfg_scale"],
        policy=args["remasking"],
        stop_at_eos=False,
    )
    width = case["prompt"].shape[1]
    is_real = case.get("prompt_attention_mask", torch.ones_like(case["prompt"])).bool()
    prompts = [row[real] for row, real in zip(case["prompt"], is_real, strict=True)]

    def draw(row: int, stream: str, step: int, shape: tuple[int, ...]) -> Tensor:
        start = width + step // config.steps_per_block * args["block_length"]
        return case["uniform_draws"][step, row, start : start + shape[0]]

    output, canvases = _decode(model, prompts, config, draw)
    start = [width - len(prompt) for prompt in prompts]
    history = torch.cat([case["canvas_before_forward"], case["output"][None]])
    golden = (case["output"], case["unmask_step"], history)
    worst = _compare(output, canvases, prompts, *golden, start)
    # The official code counts a conditional and an unconditional pass as one doubled batch.
    passes = 2 if args["cfg_scale"] else 1
    worst["count.forwards"] = abs(output.num_forwards - passes * meta["num_forwards"])
    return worst


def mdlm(model: nn.Module, meta: dict[str, Any], case: Tensors) -> dict[str, float]:
    """Replay a decode, or an infilling, of dllm's masked sampler."""
    args = meta["args"]
    config = SamplingConfig(
        max_new_tokens=args.get("max_new_tokens", 1),
        num_unmasking_steps=args["steps"],
        block_length=args["block_size"],
        uneven_blocks=True,
        guidance_scale=args.get("cfg_scale", 0.0),
        policy=args["remasking"],
        step_schedule="linear",
        suppress_tokens=args.get("suppress_tokens", ()),
        # Despite their name they are chosen like any other, and only lose their confidence.
        defer_tokens=args.get("begin_suppress_tokens", ()),
        stop_at_eos=False,
        infill=meta["mode"] == "infill",
    )
    prompts = [case[key] for key in sorted(case) if key.startswith("prompt")]

    def draw(row: int, stream: str, step: int, shape: tuple[int, ...]) -> Tensor:
        start = len(prompts[row]) + step // config.steps_per_block * args["block_size"]
        return case["uniform_draws"][step, row, start : start + shape[0]]

    output, canvases = _decode(model, prompts, config, draw)
    golden = (case["output"], case["unmask_step"], case["history"])
    return _compare(output, canvases, prompts, *golden, [0] * len(prompts))


SAMPLERS: dict[str, Callable[[nn.Module, dict[str, Any], Tensors], dict[str, float]]] = {
    "llada_official": llada_official,
    "mdlm": mdlm,
    "llada2_block": replay_blocks.llada2_block,
    "llada21": replay_blocks.llada21,
}


def _decode(
    model: nn.Module, prompts: list[Tensor], config: SamplingConfig, draw: Draw
) -> tuple[DecodeOutput, list[Tensor]]:
    canvases: list[Tensor] = []
    output = decode(
        model, prompts, config, on_step=lambda step: canvases.append(step.canvas), draw=draw
    )
    return output, canvases


def _compare(
    output: DecodeOutput,
    canvases: list[Tensor],
    prompts: list[Tensor],
    golden_output: Tensor,
    golden_steps: Tensor,
    golden_history: Tensor,
    starts: list[int],
) -> dict[str, float]:
    """Count what differs, row by row, from the golden run.

    Args:
        output: Of the decode, rows padded on the right.
        canvases: [B, T] after each step.
        prompts: [L_i] as decoded.
        golden_output: [B, G], the last canvas.
        golden_steps: [B, G], the step that filled a position, -1 for none.
        golden_history: [S + 1, B, G], the canvas before the first and after every step.
        starts: Column of `golden_steps` at which each row begins.
    """
    wrong = {"count.tokens": 0.0, "count.order": 0.0, "count.history": 0.0}
    for row, start in enumerate(starts):
        width = int(golden_steps[row].ge(0).nonzero().max()) + 1 - start
        width = max(width, len(prompts[row]))
        columns = slice(start, start + width)
        steps = golden_steps[row, columns]
        # In the reference a row waits at the end of a block for the others; ours does not.
        own = torch.unique(steps[steps >= 0])
        ranks = torch.where(steps < 0, -1, torch.searchsorted(own, steps.contiguous()))
        wrong["count.order"] += int((output.unmask_step[row, :width] != ranks).sum())
        golden = golden_output[row, columns]
        wrong["count.tokens"] += int((output.canvas[row, :width] != golden).sum())
        for index, step in enumerate(own.tolist()):
            golden = golden_history[step + 1, row, columns]
            wrong["count.history"] += int((canvases[index][row, :width] != golden).sum())
    return wrong
