"""Rotary position embedding (arXiv 2104.09864), halves rotated against each other."""

import torch
from transformers.models.llama.modeling_llama import rotate_half

from memdlm.backbones.operation_order import is_order_free


def rotate(heads: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return `heads` rotated; dimensions beyond the embedding's pass through.

    Args:
        heads: [B, heads, Q, D].
        embeddings: Cosines and sines, [1 or B, Q, R] each, R at most D.
    """
    cosine, sine = (part.unsqueeze(1) for part in embeddings)
    rotary, rest = heads.tensor_split([cosine.shape[-1]], dim=-1)
    # Not in half precision, where the products that are added would be rounded much differently.
    if is_order_free() and heads.dtype == cosine.dtype == torch.float32:
        rotated = _rotate_in_two_passes(rotary, cosine, sine)
    else:
        rotated = rotary * cosine + rotate_half(rotary) * sine
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


def _rotate_in_two_passes(
    rotary: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> torch.Tensor:
    """Do the same without a rotated copy that is multiplied and added."""
    half = rotary.shape[-1] // 2
    rotated = rotary * cosine
    rotated[..., :half].addcmul_(rotary[..., half:], sine[..., :half], value=-1)
    rotated[..., half:].addcmul_(rotary[..., :half], sine[..., half:])
    return rotated
