"""What the layers of one forward share, and the part of it that some positions need.

Shapes: B batch, L length, P positions per row, H width.
"""

from dataclasses import dataclass, replace

import torch

from memdlm.backbones.kv_cache import AttentionCache


@dataclass(frozen=True)
class LayerInputs:
    """What every layer of one forward shares.

    Attributes:
        attention_mask: None (all attend to all) or a mask [B, 1, L or 1, L], True/0 = may attend.
        position_embeddings: Rotary cosines and sines, [1 or B, L, rotary dims] each.
        cache: What takes the layers' keys and values and gives those to attend to: earlier
            forwards' when decoding, see also `partial_prefix`. None: each layer's own.
    """

    attention_mask: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    cache: AttentionCache | None = None


def gather_positions(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return `hidden` [B, L, H] at `positions` [B, P] as [B, P, H]."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def narrow_inputs(inputs: LayerInputs, positions: torch.Tensor) -> LayerInputs:
    """Return what a layer needs where only `positions` [B, P] ask; keys stay those of all L."""
    mask, rows = inputs.attention_mask, positions.shape[0]
    if mask is not None and mask.shape[2] > 1:
        index = positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        mask = mask.expand(rows, -1, -1, -1).gather(2, index)
    cosine, sine = (
        gather_positions(part.expand(rows, -1, -1), positions)
        for part in inputs.position_embeddings
    )
    return replace(inputs, attention_mask=mask, position_embeddings=(cosine, sine))
