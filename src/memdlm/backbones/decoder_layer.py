"""The layer that all families are made of.

Shapes: B batch, L length, P positions per row, H width.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from memdlm.backbones.first_attention import FirstAttention
from memdlm.backbones.layer_inputs import LayerInputs, gather_positions
from memdlm.backbones.narrow_attention import attend_at


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, which may answer at chosen positions only."""

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        norms: Sequence[nn.Module],
        shared_expert: nn.Module | None = None,
    ) -> None:
        """Assemble a layer from its parts; `norms` come before attention and feed-forward."""
        super().__init__()
        # Attention modules of transformers are causal unless told otherwise.
        setattr(attention, "is_causal", False)  # noqa: B010 - nn.Module types hide plain attributes
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
        elif positions is not None:
            normed = self.input_layernorm(hidden)
            attended = attend_at(self.self_attn, normed, inputs, positions)
            hidden = gather_positions(hidden, positions)
        else:
            attended, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden),
                position_embeddings=inputs.position_embeddings,
                attention_mask=inputs.attention_mask,
                past_key_values=inputs.cache,
            )
        hidden = hidden + attended
        normed = self.post_attention_layernorm(hidden)
        update = self.mlp(normed)
        if self.has_shared_expert:
            update = update + self.shared_expert(normed)
        return hidden + update
