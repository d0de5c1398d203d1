"""The operations of the published modelling code in the place of ours, on our networks.

The official code of LLaDA and LLaDA2.x takes RMS norms, rotary embeddings and gates one elementary
operation at a time, and visits experts in a loop. So do these, in the same order: with the same
bits as ours outside of a decode, where ours may sum in another order. They are written out, so that
the baseline stays where it is when ours become faster.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers.models.llama.modeling_llama import rotate_half

from memdlm.backbones import attention, experts
from memdlm.backbones.gated_mlp import GatedMLP
from memdlm.backbones.rms_norm import RMSNorm


@contextmanager
def published_operations() -> Iterator[None]:
    """Run all forwards within as the published code would."""
    with ExitStack() as stack:
        for owner, name, function in (
            (RMSNorm, "forward", _norm),
            (GatedMLP, "forward", _feed_forward),
            (attention, "rotate", _rotate),
            (experts, "grouped_linear", experts._looped_linear),
            (experts, "gated", _gated),
        ):
            stack.enter_context(patch.object(owner, name, function))
        yield


def _norm(self: RMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    states = hidden.to(torch.float32)
    variance = states.pow(2).mean(-1, keepdim=True)
    states = states * torch.rsqrt(variance + self.eps)
    return self.weight * states.to(hidden.dtype)


def _feed_forward(self: GatedMLP, hidden: torch.Tensor) -> Any:
    return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


def _rotate(heads: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cosine, sine = (part.unsqueeze(1) for part in embeddings)
    rotary, rest = heads[..., : cosine.shape[-1]], heads[..., cosine.shape[-1] :]
    rotated = (rotary * cosine) + (rotate_half(rotary) * sine)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


def _gated(act: Any, gates: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = act(gates) * values
    return product
