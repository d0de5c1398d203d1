"""Masked decoding: LLaDA's sampler (arXiv 2502.09992, algorithms 4 and 5) over any masked model.

Every step predicts all slots of the current block, commits the most confident ones and leaves the
rest masked. Blocks are filled from left to right; one block is the whole response by default.
Knows the model only through its call (logits at given positions) and its special token ids.

Shapes: `B` rows, `T` canvas, `S` slots of a row, `P` slots of a block, `V` vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError, NonFiniteError, UsageError
from memdlm.sampling.canvas import Canvas, prompt_canvas
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.token_choice import Draw, choose_tokens, row_draws, suppress
from memdlm.sampling.unmasking import UNMASKING_POLICIES, most_confident, transfer_schedule


@dataclass(frozen=True)
class DecodeStep:
    """One unmasking step, as `on_step` sees it.

    Attributes:
        index: 0 for the first step.
        num_steps: Steps of the whole decode.
        canvas: [B, T] int64 after the step; not overwritten by later steps.
        committed: [B, T] bool, the slots filled in this step.
    """

    index: int
    num_steps: int
    canvas: Tensor
    committed: Tensor


@dataclass(frozen=True)
class DecodeOutput:
    """What a decode gives.

    Attributes:
        tokens: Per row the generated tokens, 1-D int64 on the CPU; cut before the first
            end-of-text token when `stop_at_eos` is set.
        canvas: [B, T] int64, prompts and all slots filled, padding on the right.
        unmask_step: [B, T] int64, the step that filled a position; -1 = not a slot.
        num_forwards: Calls of the model (two per step under guidance).
    """

    tokens: list[Tensor]
    canvas: Tensor
    unmask_step: Tensor
    num_forwards: int


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[Tensor],
    config: SamplingConfig | None = None,
    *,
    on_step: Callable[[DecodeStep], None] | None = None,
    draw: Draw | None = None,
) -> DecodeOutput:
    """Decode every prompt; a row's tokens do not depend on the other rows.

    Runs in evaluation mode without gradients; the mode of every submodule and the global random
    state are afterwards as before.

    Args:
        model: A masked model: `model(ids, attention_mask=..., positions=[B, P]).logits` [B, P, V].
        prompts: One 1-D int64 tensor of token ids per row.
        config: Settings; None for the defaults.
        on_step: Called after every step, for streaming, progress and traces.
        draw: Source of uniform numbers; None gives every row its own generator seeded with
            `config.seed`. Pass `row_draws(seeds, device)` for one seed per row.

    Raises:
        UsageError: An empty prompt, or a prompt whose canvas exceeds the model's context.
        ConfigError: The model lacks a token id the decode needs, or `suppress_tokens` exceeds the
            vocabulary.
        NonFiniteError: The model's logits are nan.
    """
    config = config or SamplingConfig()
    device = next(model.parameters()).device
    canvas = _lay_out(model, prompts, config, device)
    draw = draw or row_draws([config.seed] * len(prompts), device)
    with _evaluation_mode(model):
        tokens, unmask_step, num_forwards = _run(model, canvas, config, on_step, draw)
    new_tokens = tokens.gather(1, canvas.slot_positions()).cpu()
    if config.stop_at_eos:
        eos_ids = _eos_ids(model)
        rows = [_before_first(row, eos_ids) for row in new_tokens]
    else:
        rows = list(new_tokens)
    return DecodeOutput(rows, tokens, unmask_step, num_forwards)


def _run(
    model: nn.Module,
    canvas: Canvas,
    config: SamplingConfig,
    on_step: Callable[[DecodeStep], None] | None,
    draw: Draw,
) -> tuple[Tensor, Tensor, int]:
    """Fill all slots; return the canvas [B, T], the step of each slot [B, T], and model calls."""
    tokens = canvas.tokens
    blocks = canvas.slot_positions().unflatten(1, (config.num_blocks, config.tokens_per_block))
    unmask_step = torch.full_like(tokens, -1)
    is_nan = torch.zeros((), dtype=torch.bool, device=tokens.device)
    schedule = transfer_schedule(
        config.tokens_per_block, config.steps_per_block, config.step_schedule
    )
    counts = [count for count in schedule if count]
    num_steps = config.num_blocks * len(counts)
    for index in range(num_steps):
        block, step_of_block = divmod(index, len(counts))
        positions = blocks[:, block]  # [B, P]
        masked = unmask_step.gather(1, positions) < 0  # [B, P]
        logits = _slot_logits(model, canvas, tokens, positions, config)  # [B, P, V]
        chosen, confidence, nan = _predict(logits, config, model, draw, index)
        is_nan |= nan
        committed = most_confident(confidence, masked, counts[step_of_block])
        tokens = tokens.scatter(
            1, positions, torch.where(committed, chosen, tokens.gather(1, positions))
        )
        unmask_step.scatter_(
            1, positions, unmask_step.gather(1, positions).masked_fill(committed, index)
        )
        if on_step is not None:
            on_step(DecodeStep(index, num_steps, tokens, unmask_step == index))
    # One look at the end: asking the device at every step would make each step wait for it.
    if is_nan:
        raise NonFiniteError(
            "the model's logits are nan while decoding; check the checkpoint, or load it in float32"
        )
    return tokens, unmask_step, num_steps * (2 if config.guidance_scale else 1)


def _predict(
    logits: Tensor, config: SamplingConfig, model: nn.Module, draw: Draw, index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return every slot's token [B, P] and confidence [B, P], and whether any logit is nan."""
    num_slots, vocabulary = logits.shape[1:]
    chosen = choose_tokens(
        logits,
        config.temperature,
        _model_config(model).mask_token_id,
        lambda: draw("token_choice", index, (num_slots, vocabulary)),
    )
    probabilities = logits.softmax(dim=-1)
    confidence = UNMASKING_POLICIES[config.policy](
        probabilities, chosen, lambda: draw("unmasking", index, (num_slots,))
    )
    return chosen, confidence, probabilities[..., 0].isnan().any()


def _slot_logits(
    model: nn.Module, canvas: Canvas, tokens: Tensor, positions: Tensor, config: SamplingConfig
) -> Tensor:
    """Return float32 logits [B, P, V] at `positions`, guided and without suppressed tokens."""
    mask = canvas.attention_mask
    logits: Tensor = model(tokens, attention_mask=mask, positions=positions).logits.float()
    if config.guidance_scale:
        # Two calls of B rows, not one of 2B: what is bound to the rows of the batch stays bound.
        without_prompt = tokens.where(canvas.slots, _model_config(model).mask_token_id)
        unconditional = model(
            without_prompt, attention_mask=mask, positions=positions
        ).logits.float()
        logits = unconditional + (config.guidance_scale + 1) * (logits - unconditional)
    vocabulary = logits.shape[-1]
    if any(token >= vocabulary for token in config.suppress_tokens):
        raise ConfigError(
            f"sampling.suppress_tokens: id {max(config.suppress_tokens)} is beyond the model's "
            f"vocabulary of {vocabulary}; use ids up to {vocabulary - 1}"
        )
    return suppress(logits, config.suppress_tokens)


def _lay_out(
    model: nn.Module, prompts: Sequence[Tensor], config: SamplingConfig, device: torch.device
) -> Canvas:
    model_config = _model_config(model)
    required = ["mask_token_id", "pad_token_id"] + ["eos_token_id"] * config.stop_at_eos
    for name in required:
        if getattr(model_config, name) is None:
            raise ConfigError(f"the model's config has no {name}; set it before decoding")
    context = model_config.max_position_embeddings
    for row, prompt in enumerate(prompts):
        if len(prompt) + config.max_new_tokens > context:
            room = context - config.max_new_tokens
            shorter = f"cut the prompt to {room} tokens or " if room > 0 else ""
            raise UsageError(
                f"prompt {row} has {len(prompt)} tokens, which with {config.max_new_tokens} new "
                f"ones exceeds the model's context of {context}; {shorter}lower max_new_tokens"
            )
    return prompt_canvas(
        prompts,
        config.max_new_tokens,
        model_config.mask_token_id,
        model_config.pad_token_id,
        device,
    )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; on exit give every submodule back the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _model_config(model: nn.Module) -> Any:
    return model.config


def _eos_ids(model: nn.Module) -> set[int]:
    eos = _model_config(model).eos_token_id
    return {eos} if isinstance(eos, int) else set(eos)


def _before_first(row: Tensor, stop_ids: set[int]) -> Tensor:
    """Return the 1-D row up to, and without, its first token in `stop_ids`."""
    for index, token in enumerate(row.tolist()):
        if token in stop_ids:
            return row[:index]
    return row
