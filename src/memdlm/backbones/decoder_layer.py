"""The layer that all families are made of.

Shapes: B batch, L length, P positions per row, H width.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from memdlm.backbones.attention import Attention
from memdlm.backbones.first_attention import FirstAttention
from memdlm.backbones.layer_inputs import LayerInputs, gather_positions


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, which may answer at chosen positions only."""

    def __init__(
        self,
        attention: Attention,
        mlp: nn.Module,
        norms: Sequence[nn.Module],
        shared_expert: nn.Module | None = None,
    ) -> None:
        """Assemble a layer from its parts; `norms` come before attention and feed-forward."""
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm, self.post_attention_layernorm = norms
        if shared_expert is not None:
            self.shared_expert = shared_expert
        self.has_shared_expert = shared_expert is not None

    def forward(
        self,
        hidden: torch.Tensor,
        inputs: LayerInputs,
        positions: torch.Tensor | None = None,
        first: FirstAttention | None = None,
    ) -> torch.Tensor:
        """Return the next hidden states, [B, L, H] or, with `positions` [B, P], [B, P, H].

        Keys and values are those of the whole sequence. Leaving the rest out at other positions is
        exact in the last layer, where nothing reads them; `first` belongs to the first layer.
        """
        if first is not None:
            attended = first(self.self_attn, self.input_layernorm, hidden, inputs)
        else:
            attended = self.self_attn(self.input_layernorm(hidden), inputs, positions)
            if positions is not None:
                hidden = gather_positions(hidden, positions)
        hidden = hidden + attended
        normed = self.post_attention_layernorm(hidden)
        update = self.mlp(normed)
        if self.has_shared_expert:
            update = update + self.shared_expert(normed)
        return hidden + update
