"""Replay of the block samplers of LLaDA2.x: `sampler/llada2_block/*` and `sampler/llada21/*`.

Every case is decoded without and with the exact cache; both must give the recorded canvas after
every step.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode
from memdlm.sampling.masked_decoding import DecodeOutput

Tensors = dict[str, Tensor]


def llada2_block(model: nn.Module, meta: dict[str, Any], case: Tensors) -> dict[str, float]:
    """Replay a decode of MemDLM's block sampler: a threshold, no editing."""
    args = meta["args"]
    # The published settings name steps of a block, of which `minimal_topk` allows only some.
    steps = min(args["steps_per_block"], args["max_new_tokens"] // args.get("minimal_topk", 1))
    num_blocks = -(-args["max_new_tokens"] // args["block_size"])
    config = SamplingConfig(
        max_new_tokens=args["max_new_tokens"],
        num_unmasking_steps=steps * num_blocks,
        block_length=args["block_size"],
        decoder="block",
        threshold=args["threshold"],
        abandon_block_at_eos=args.get("eos_early_stop", False),
        stop_at_eos=False,
    )
    worst, _ = _replay(model, meta, case["prompts"][0], config, case)
    return worst


def llada21(model: nn.Module, meta: dict[str, Any], case: Tensors) -> dict[str, float]:
    """Replay a decode of LLaDA2.1's sampler with editing, and its answer."""
    args = meta["args"]
    config = SamplingConfig(
        max_new_tokens=args["max_new_tokens"],
        min_tokens_per_step=args.get("num_to_transfer", 1),
        block_length=args["block_size"],
        decoder="block",
        threshold=args["threshold"],
        editing_threshold=args["editing_threshold"],
        max_editing_steps=args["max_post_steps"],
        temperature=args["temperature"],
        stop_early=args.get("eos_early_stop", False),
    )
    worst, answers = _replay(model, meta, case["prompt"], config, case)
    for answer in answers:
        # The model's own `generate` keeps the end-of-text token; ours cuts before it.
        golden = case["generate_output"][0]
        golden = golden[golden != meta["eos_token_id"]]
        wrong = len(golden) != len(answer) or int((golden != answer).sum())
        worst["count.tokens"] += float(wrong)
    return worst


def _replay(
    model: nn.Module,
    meta: dict[str, Any],
    prompt: Tensor,
    config: SamplingConfig,
    case: Tensors,
) -> tuple[dict[str, float], list[Tensor]]:
    """Return what differs from the case, summed over both ways of decoding, and their answers."""
    worst = {"count.tokens": 0.0, "count.history": 0.0, "count.order": 0.0, "count.forwards": 0.0}
    answers = []
    for cache in ("none", "exact"):
        history = []
        output = decode(
            model,
            [prompt],
            replace(config, cache=cache),
            on_step=lambda step, history=history: history.append(step.canvas),  # type: ignore[misc]
        )
        golden = case["history"][1:]
        worst["count.forwards"] += abs(output.num_forwards - meta["num_forwards"])
        worst["count.tokens"] += int((output.canvas != case["output"]).sum())
        is_as_long = len(history) == len(golden)
        wrong = (torch.stack(history) != golden).sum() if is_as_long else golden.numel()
        worst["count.history"] += int(wrong)
        worst["count.order"] += _wrong_order(output, case["history"], meta["mask_token_id"])
        answers.append(output.tokens[0])
    return worst, answers


def _wrong_order(output: DecodeOutput, history: Tensor, mask_token_id: int) -> int:
    """Count positions [1, T] that were not filled in the step in which the case filled them."""
    masked = (history == mask_token_id).sum(dim=0)  # states before it was filled, [1, T]
    never = masked == len(history)
    golden = torch.where(never | (masked == 0), -1, masked - 1)
    return int((output.unmask_step != golden).sum())
