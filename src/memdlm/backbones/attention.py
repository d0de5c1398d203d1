"""Bidirectional attention, which may ask at some positions only.

Queries there, keys and values everywhere is what the last layer needs when the head reads a few
positions. Exact, since attention makes every query's result by itself.

Shapes: B batch, L length, P positions per row, Q their number or L, K keys, H width, N query heads,
G key-value heads, D head width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from memdlm.backbones.layer_inputs import LayerInputs, gather_positions, narrow_inputs
from memdlm.backbones.rms_norm import RMSNorm
from memdlm.backbones.rotary import rotate

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [B, Q, N, D], keys and values [B, L, G, D], before the rotary embedding."""


class Attention(nn.Module, ABC):
    """Grouped-query attention with rotary embeddings; how heads are projected is the family's."""

    # Read by the attention functions of transformers, which are causal unless told otherwise.
    is_causal = False

    def __init__(self, config: Any, index: int) -> None:
        """Prepare the attention of layer `index`."""
        super().__init__()
        self.config = config
        self.layer_idx = index
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5

    @abstractmethod
    def heads(self, hidden: torch.Tensor, positions: torch.Tensor | None = None) -> Heads:
        """Return the heads of normed states [B, L, H]; queries at `positions` [B, P] if given."""

    @abstractmethod
    def project(self, attended: torch.Tensor) -> torch.Tensor:
        """Return the states [B, Q, H] that the output projection makes of heads [B, Q, N, D]."""

    def forward(
        self, hidden: torch.Tensor, inputs: LayerInputs, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the attended states: [B, L, H], or [B, P, H] at `positions`.

        Args:
            hidden: Normed states [B, L, H].
            inputs: As for all L positions.
            positions: [B, P] int64.
        """
        query, key, value = self.heads(hidden, positions)
        asking = inputs if positions is None else narrow_inputs(inputs, positions)
        query = rotate(query.transpose(1, 2), asking.position_embeddings)
        key = rotate(key.transpose(1, 2), inputs.position_embeddings)
        value = value.transpose(1, 2)
        if inputs.cache is not None:
            key, value = inputs.cache.update(key, value, self.layer_idx)
        return self.project(self._attend(query, key, value, asking.attention_mask))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return [B, Q, N, D] for queries [B, N, Q, D] and keys and values [B, G, K, D]."""
        implementation: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = (self.config.attention_dropout or 0.0) if self.training else 0.0
        attended: torch.Tensor = implementation(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling
        )[0]
        return attended


class SplitAttention(Attention):
    """Attention with projections of their own for queries, keys and values."""

    def __init__(
        self, config: Any, index: int, has_qkv_bias: bool = False, has_qk_norm: bool = False
    ) -> None:
        """Build the attention of layer `index`.

        Args:
            config: A family's.
            index: From 0.
            has_qkv_bias: Whether queries, keys and values have biases; the output has none.
            has_qk_norm: Whether queries and keys are normed per head.
        """
        super().__init__(config, index)
        width, own = config.hidden_size, self.num_heads * self.head_dim
        shared = self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, own, bias=has_qkv_bias)
        self.k_proj = nn.Linear(width, shared, bias=has_qkv_bias)
        self.v_proj = nn.Linear(width, shared, bias=has_qkv_bias)
        self.o_proj = nn.Linear(own, width, bias=False)
        self.has_qk_norm = has_qk_norm
        if has_qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def heads(self, hidden: torch.Tensor, positions: torch.Tensor | None = None) -> Heads:
        """See `Attention`."""
        asking = hidden if positions is None else gather_positions(hidden, positions)
        query = self.q_proj(asking).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(hidden).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden).unflatten(-1, (-1, self.head_dim))
        if self.has_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def project(self, attended: torch.Tensor) -> torch.Tensor:
        """See `Attention`."""
        projected: torch.Tensor = self.o_proj(attended.flatten(2))
        return projected
