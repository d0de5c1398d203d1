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
        slots: [B, T] bool, the positions to fill; S of them in every row. A mask token inside a
            prompt is part of the prompt and stays.
    """

    tokens: Tensor
    attention_mask: Tensor | None
    slots: Tensor

    def slot_positions(self) -> Tensor:
        """Return the column of every slot, from left to right: [B, S] int64."""
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
    width = max(len(prompt) for prompt in prompts) + max_new_tokens
    tokens = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(tokens)
    slots = torch.zeros_like(tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        end = len(prompt) + max_new_tokens
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : end] = mask_token_id
        attention_mask[row, :end] = 1
        slots[row, len(prompt) : end] = True
    is_padded = not bool(attention_mask.all())
    return Canvas(
        tokens=tokens.to(device),
        attention_mask=attention_mask.to(device) if is_padded else None,
        slots=slots.to(device),
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
