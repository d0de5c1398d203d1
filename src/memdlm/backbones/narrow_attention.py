"""Attention that asks at some positions only: queries there, keys and values everywhere.

What the last layer needs when the head reads a few positions. Exact, since attention makes every
query's result by itself. Projections, norms and adapters are the attention module's own, whichever
family's; only the order of the work is ours.

Shapes: B batch, L length, P positions per row, Q their number or L, H width, N query heads, G
key-value heads, D head width.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from memdlm.backbones.layer_inputs import LayerInputs, gather_positions, narrow_inputs

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [B, Q, N, D], keys and values [B, L, G, D], before the rotary embedding."""


def attend_at(
    attention: nn.Module, hidden: torch.Tensor, inputs: LayerInputs, positions: torch.Tensor
) -> torch.Tensor:
    """Return what `attention` gives at `positions`: [B, P, H].

    Args:
        attention: An attention module of transformers with separate projections, or one of ours
            that has `heads(hidden, positions) -> Heads` and an output projection named `dense`.
        hidden: Normed states [B, L, H].
        inputs: As for all L positions.
        positions: [B, P] int64.
    """
    module = cast(Any, attention)
    query, key, value = project_heads(module, hidden, positions)
    narrowed = narrow_inputs(inputs, positions)
    query = rotate(query.transpose(1, 2), narrowed.position_embeddings)
    key = rotate(key.transpose(1, 2), inputs.position_embeddings)
    value = value.transpose(1, 2)
    if inputs.cache is not None:
        key, value = inputs.cache.update(key, value, module.layer_idx)
    attended, _ = attend(module, query, key, value, narrowed.attention_mask)
    return project_output(module, attended)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return attended heads [B, Q, N, D], and the weights if the implementation has them.

    Args:
        module: An attention module; its config names the implementation.
        query: [B, N, Q, D].
        key: [B, G, K, D].
        value: [B, G, K, D].
        mask: As `LayerInputs` has it, over the K keys.
    """
    implementation: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    dropout = module.config.attention_dropout if module.training else 0.0
    attended, weights = implementation(
        module, query, key, value, mask, dropout=dropout, scaling=module.scaling
    )
    return attended, weights


def project_heads(
    module: Any, hidden: torch.Tensor, positions: torch.Tensor | None = None
) -> Heads:
    """Return the heads of states [B, L, H]; queries at `positions` [B, P] if given.

    Args:
        module: As `attention` of `attend_at`.
        hidden: Normed states.
        positions: [B, P] int64.
    """
    own_heads: Callable[..., Heads] | None = getattr(module, "heads", None)
    if own_heads is not None:
        return own_heads(hidden, positions)
    width = module.head_dim
    asking = hidden if positions is None else gather_positions(hidden, positions)
    query = module.q_proj(asking).unflatten(-1, (-1, width))
    key = module.k_proj(hidden).unflatten(-1, (-1, width))
    value = module.v_proj(hidden).unflatten(-1, (-1, width))
    if getattr(module, "use_qk_norm", False):
        query, key = module.q_norm(query), module.k_norm(key)
    return query, key, value


def project_output(module: Any, attended: torch.Tensor) -> torch.Tensor:
    """Return the states [B, Q, H] that a module's output projection makes of heads [B, Q, N, D]."""
    output = module.o_proj if hasattr(module, "o_proj") else module.dense
    projected: torch.Tensor = output(attended.flatten(2))
    return projected


def rotate(heads: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return `heads` [B, heads, Q, D] rotated; dimensions beyond the embedding's pass through."""
    cosine, sine = (part.unsqueeze(1) for part in embeddings)
    rotary, rest = heads.tensor_split([cosine.shape[-1]], dim=-1)
    rotated = rotary * cosine + rotate_half(rotary) * sine
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated
