"""Decodes of the official samplers, reproduced token by token and step by step.

The official prompts are padded on the left; ours are stripped and padded on the right. Rotary
positions are relative, so the answers must be the same.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from memdlm.backbones.llada import LLaDAForMaskedLM
from memdlm.backbones.llada_moe import LLaDAMoEForMaskedLM
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.masked_decoding import decode

FIXTURES = Path(__file__).parents[2] / "fixtures"
FAMILIES = {"backbones/llada": LLaDAForMaskedLM, "backbones/lladamoe": LLaDAMoEForMaskedLM}


@cache
def load_model(name: str, mask_token_id: int) -> nn.Module:
    model = FAMILIES[name].from_pretrained(FIXTURES / name)
    # Official LLaDA-MoE configs do not name it; a tokenizer does, and here the recorded decode.
    model.config.mask_token_id = mask_token_id
    return model


def read_case(sampler, name):
    folder = FIXTURES / "sampler" / sampler / name
    meta = json.loads((folder / "meta.json").read_text())
    return meta, load_file(folder / "tensors.safetensors")


def slots_of(tensor, prompts, num_slots):
    """Return [B, S]: the slots of a right-padded [B, T]."""
    rows = zip(tensor, prompts, strict=True)
    return torch.stack([row[len(prompt) : len(prompt) + num_slots] for row, prompt in rows])


@pytest.mark.parametrize(
    "name", ["one_block", "two_per_step", "uneven_steps", "four_blocks", "cfg1p5", "random"]
)
def test_llada_official(name):
    meta, case = read_case("llada_official", name)
    args = meta["args"]
    num_slots = args["gen_length"]
    config = SamplingConfig(
        max_new_tokens=num_slots,
        num_unmasking_steps=args["steps"],
        block_length=args["block_length"],
        guidance_scale=args["cfg_scale"],
        policy=args["remasking"],
        stop_at_eos=False,
    )
    is_real = case.get("prompt_attention_mask", torch.ones_like(case["prompt"])).bool()
    prompts = [row[real] for row, real in zip(case["prompt"], is_real, strict=True)]

    def draw(row, stream, step, shape):
        start = case["prompt"].shape[1] + step // config.steps_per_block * args["block_length"]
        return case["uniform_draws"][step, row, start : start + shape[0]]

    canvases = []
    output = decode(
        load_model(meta["model"], meta["mask_token_id"]),
        prompts,
        config,
        on_step=lambda step: canvases.append(step.canvas),
        draw=draw,
    )
    assert torch.equal(torch.stack(output.tokens), case["output"][:, -num_slots:])
    steps = slots_of(output.unmask_step, prompts, num_slots)
    assert torch.equal(steps, case["unmask_step"][:, -num_slots:])
    before = [slots_of(canvas, prompts, num_slots) for canvas in canvases[:-1]]
    assert torch.equal(torch.stack(before), case["canvas_before_forward"][1:, :, -num_slots:])
    # The official code counts a conditional and an unconditional pass as one doubled batch.
    assert output.num_forwards == meta["num_forwards"] * (2 if args["cfg_scale"] else 1)


@pytest.mark.parametrize(
    "name", ["cfg1", "eval_style", "fewer_steps_than_tokens", "more_steps_than_tokens", "random"]
)
def test_mdlm(name):
    meta, case = read_case("mdlm", name)
    args = meta["args"]
    num_slots = args["max_new_tokens"]
    config = SamplingConfig(
        max_new_tokens=num_slots,
        num_unmasking_steps=args["steps"],
        block_length=args["block_size"],
        guidance_scale=args.get("cfg_scale", 0.0),
        policy=args["remasking"],
        step_schedule="linear",
        stop_at_eos=False,
    )
    prompts = [case[key] for key in sorted(case) if key.startswith("prompt")]

    def draw(row, stream, step, shape):
        start = step // config.steps_per_block * args["block_size"]
        draws = slots_of(case["uniform_draws"][step], prompts, num_slots)
        return draws[row, start : start + shape[0]]

    canvases = []
    output = decode(
        load_model(meta["model"], meta["mask_token_id"]),
        prompts,
        config,
        on_step=lambda step: canvases.append(step.canvas),
        draw=draw,
    )
    assert torch.equal(output.canvas, case["output"])
    assert torch.equal(output.unmask_step, case["unmask_step"])
    assert torch.equal(torch.stack(canvases), case["history"][1:])
    assert len(canvases) == meta["num_steps"]
