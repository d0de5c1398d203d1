"""The canvas: prompts followed by mask slots, as one rectangular batch. Knows no model.

Shapes: `B` rows, `T` the longest prompt plus its slots, `S` slots of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memdlm.errors import UsageError


@dataclass(frozen=True)
class Canvas:
    """Tokens being decoded, and which of them are to be decided.

    Attributes:
        tokens: [B, T] int64; prompt, then mask tokens, then padding on the right.
        attention_mask: [B, T] int64, 1 = real, 0 = padding; None when no row is padded, so that
            the model may take its unmasked path.
        slots: [B, T] bool, the positions to fill. A `prompt_canvas` has S of them in every row, and
            a mask token inside a prompt is part of the prompt and stays; in a `block_canvas` and
            an `infill_canvas` rows may differ.
        lengths: Columns of each row before its padding.
    """

    tokens: Tensor
    attention_mask: Tensor | None
    slots: Tensor
    lengths: tuple[int, ...]

    def slot_positions(self) -> Tensor:
        """Return the column of every slot of a `prompt_canvas`, left to right: [B, S] int64."""
        return self.slots.nonzero()[:, 1].view(self.slots.shape[0], -1)


def prompt_canvas(
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    mask_token_id: int,
    pad_token_id: int,
    device: torch.device | str = "cpu",
) -> Canvas:
    """Lay out prompts of any lengths with `max_new_tokens` slots behind each.

    Padding is on the right, so each real token keeps the position it has when decoded alone.

    Args:
        prompts: One 1-D int64 tensor of token ids per row, at least one token each.
        max_new_tokens: Slots per row.
        mask_token_id: What the slots hold until they are filled.
        pad_token_id: What fills the shorter rows; hidden by the attention mask.
        device: Where the canvas lives.

    Raises:
        UsageError: No prompt, an empty prompt, or a prompt that is not a 1-D integer tensor.
    """
    _check_prompts(prompts)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    return _with_slots(prompts, lengths, mask_token_id, pad_token_id, device)


def block_canvas(
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    block_length: int,
    mask_token_id: int,
    pad_token_id: int,
    device: torch.device | str = "cpu",
) -> Canvas:
    """Lay out prompts of any lengths, each row a whole number of blocks from its first column.

    Everything behind a prompt is a slot: at least `max_new_tokens`, up to the end of the block.
    Other arguments and errors as above.
    """
    _check_prompts(prompts)
    lengths = [
        -(-(len(prompt) + max_new_tokens) // block_length) * block_length for prompt in prompts
    ]
    return _with_slots(prompts, lengths, mask_token_id, pad_token_id, device)


def _with_slots(
    prompts: Sequence[Tensor],
    lengths: Sequence[int],
    mask_token_id: int,
    pad_token_id: int,
    device: torch.device | str,
) -> Canvas:
    """Put slots behind every prompt, up to the row's length."""
    tokens = torch.full((len(prompts), max(lengths)), pad_token_id, dtype=torch.int64)
    slots = torch.zeros_like(tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : lengths[row]] = mask_token_id
        slots[row, len(prompt) : lengths[row]] = True
    return _canvas(tokens, slots, lengths, device)


def infill_canvas(
    prompts: Sequence[Tensor],
    mask_token_id: int,
    pad_token_id: int,
    device: torch.device | str = "cpu",
) -> Canvas:
    """Lay out prompts of any lengths whose mask tokens are the slots; arguments as above.

    Raises:
        UsageError: As above, or a prompt holds no mask token.
    """
    _check_prompts(prompts)
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.full((len(prompts), max(lengths)), pad_token_id, dtype=torch.int64)
    slots = torch.zeros_like(tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        slots[row, : len(prompt)] = prompt == mask_token_id
        if not slots[row].any():
            raise UsageError(
                f"prompt {row} holds no mask token (id {mask_token_id}) to fill; add one or turn "
                "infill off"
            )
    return _canvas(tokens, slots, lengths, device)


def _canvas(
    tokens: Tensor, slots: Tensor, lengths: Sequence[int], device: torch.device | str
) -> Canvas:
    is_real = torch.arange(tokens.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    is_padded = not bool(is_real.all())
    return Canvas(
        tokens=tokens.to(device),
        attention_mask=is_real.to(torch.int64).to(device) if is_padded else None,
        slots=slots.to(device),
        lengths=tuple(lengths),
    )


def _check_prompts(prompts: Sequence[Tensor]) -> None:
    if len(prompts) == 0:
        raise UsageError("there is no prompt to decode; give at least one")
    for row, prompt in enumerate(prompts):
        if prompt.dim() != 1 or prompt.dtype != torch.int64:
            raise UsageError(
                f"prompt {row} is a {prompt.dtype} tensor of shape {tuple(prompt.shape)}; "
                "give a 1-D int64 tensor of token ids"
            )
        if len(prompt) == 0:
            raise UsageError(f"prompt {row} is empty; give it at least one token")
