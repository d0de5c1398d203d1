"""LLaDA-MoE: the architecture of LLaDA-MoE-7B-A1B, official layout in and out.

Like LLaDA, with qk-norm, partial rotary embeddings and routed experts. The router takes an fp32
softmax over all experts, then the top k, never renormalised; score function, groups and scaling in
the config are ignored by the official code, and so here. Source: the checkpoint's own modelling
code, frozen in tests/fixtures/backbones/lladamoe.
"""

from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

from memdlm.backbones.attention import SplitAttention
from memdlm.backbones.base import (
    DiffusionMaskedLM,
    DiffusionModel,
    DiffusionPreTrainedModel,
)
from memdlm.backbones.checkpoint_layout import (
    apply_attribute_map,
    fused_experts,
    official_dict,
    refuse,
    register_family,
    set_rotary,
)
from memdlm.backbones.decoder_layer import DecoderLayer
from memdlm.backbones.experts import Experts
from memdlm.backbones.gated_mlp import GatedMLP
from memdlm.backbones.rms_norm import RMSNorm

PUBLISHED_MASK_TOKEN_ID = 156895

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "clip_qkv": (None,),
    "qk_layernorm": (True,),
    "rope_scaling": (None,),
    "tie_word_embeddings": (False, None),
    "norm_topk_prob": (False, None),
}


class LLaDAMoEConfig(PreTrainedConfig):
    """Configuration of LLaDA-MoE under its official names; transformers' names work as aliases."""

    model_type = "lladamoe"
    architecture: ClassVar[str] = "LLaDAMoEModelLM"
    attribute_map = {  # noqa: RUF012 - transformers reads a class-level dict
        "intermediate_size": "dense_intermediate_size",
        "moe_intermediate_size": "expert_intermediate_size",
    }

    vocab_size: int = 157184
    hidden_size: int = 2048
    dense_intermediate_size: int | None = 8192
    expert_intermediate_size: int = 1024
    shared_expert_intermediate_size: int | None = None
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_layer_freq: list[int] | None = None
    moe_router_enable_expert_bias: bool | None = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float | int | None = 1.0
    attention_bias: bool | None = False
    attention_dropout: float | int | None = 0.0
    qk_layernorm: bool = True
    norm_topk_prob: bool | None = False
    mask_token_id: int | None = None
    pad_token_id: int | None = 156892
    eos_token_id: int | list[int] | None = 156892

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill what official files leave null and refuse what is not implemented."""
        kwargs = apply_attribute_map(self, kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.moe_layer_freq is None:
            self.moe_layer_freq = [1] * self.num_hidden_layers
        if self.mask_token_id is None and self.vocab_size > PUBLISHED_MASK_TOKEN_ID:
            self.mask_token_id = PUBLISHED_MASK_TOKEN_ID
        super().__post_init__(**kwargs)
        refuse(self, _SUPPORTED)
        set_rotary(self, self.rope_theta, self.partial_rotary_factor)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that official files have."""
        return official_dict(super().to_dict())

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class SparseBlock(nn.Module):
    """Router and routed experts of one layer."""

    def __init__(self, config: LLaDAMoEConfig) -> None:
        """Build the block of `config`; a plain linear router, so that adapters can train it."""
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(
            config.num_experts,
            config.hidden_size,
            config.expert_intermediate_size,
            config.hidden_act,
        )
        self.expert_bias: nn.Parameter | None = None
        if config.moe_router_enable_expert_bias:
            self.expert_bias = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the mixture [B, P, H] for states [B, P, H], rows kept apart for fast weights."""
        tokens = hidden.flatten(0, 1)
        scores = self.gate(tokens).softmax(dim=-1, dtype=torch.float32)
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        weights, chosen = scores.topk(self.top_k, dim=-1)
        return self.experts(tokens, chosen, weights.to(hidden.dtype)).view_as(hidden)


# `Any`: transformers' names are aliases here.
def _build_layer(config: Any, index: int) -> DecoderLayer:
    def dense(width: int) -> GatedMLP:
        return GatedMLP(config.hidden_size, width, config.hidden_act)

    norms = tuple(RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
    attention = SplitAttention(config, index, has_qk_norm=True)
    if config.moe_layer_freq[index] == 0:
        return DecoderLayer(attention, dense(config.dense_intermediate_size), norms)
    shared_width = config.shared_expert_intermediate_size
    shared = dense(shared_width) if shared_width else None
    return DecoderLayer(attention, SparseBlock(config), norms, shared)


class LLaDAMoEPreTrainedModel(DiffusionPreTrainedModel):
    """Binds the config class."""

    config_class = LLaDAMoEConfig


class LLaDAMoEModel(DiffusionModel, LLaDAMoEPreTrainedModel):
    """The layers of LLaDA-MoE."""


class LLaDAMoEModelLM(DiffusionMaskedLM, LLaDAMoEPreTrainedModel):
    """LLaDA-MoE with its head. Named as in official `architectures`, so saved configs agree."""

    def __init__(self, config: LLaDAMoEConfig) -> None:
        """Build the model of `config` with random weights."""
        model = LLaDAMoEModel(
            config,
            _build_layer,
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            Glm4MoeRotaryEmbedding(cast(Any, config)),
            padding_idx=config.pad_token_id,  # as in the official code: pad is never trained
        )
        super().__init__(config, model)


LLaDAMoEForMaskedLM = LLaDAMoEModelLM

register_family(LLaDAMoEConfig, LLaDAMoEModelLM, fused_experts())
