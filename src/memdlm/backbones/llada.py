"""LLaDA (dense): the architecture of LLaDA-8B-Base and -Instruct, official layout in and out.

Pre-norm, RMSNorm, SiLU-gated MLP, full rotary embeddings, grouped-query attention, untied head,
bidirectional. Source: the checkpoint's own modelling code, frozen in
tests/fixtures/backbones/llada.
"""

from typing import Any, cast

from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from memdlm.backbones.attention import SplitAttention
from memdlm.backbones.base import (
    DiffusionMaskedLM,
    DiffusionModel,
    DiffusionPreTrainedModel,
)
from memdlm.backbones.checkpoint_layout import (
    apply_attribute_map,
    official_dict,
    refuse,
    register_family,
    renames,
    set_rotary,
)
from memdlm.backbones.decoder_layer import DecoderLayer
from memdlm.backbones.gated_mlp import GatedMLP
from memdlm.backbones.rms_norm import RMSNorm

PUBLISHED_MASK_TOKEN_ID = 126336

# Features of the official code that none of the published checkpoints turns on.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "alibi": (False, None),
    "rope": (True,),
    "attention_layer_norm": (False, None),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "bias_for_layer_norm": (False, None),
    "input_emb_norm": (False, None),
    "scale_logits": (False, None),
    "weight_tying": (False, None),
    "multi_query_attention": (False, None),
    "block_group_size": (1, None),
}


class LLaDAConfig(PreTrainedConfig):
    """Configuration of LLaDA under its official names; transformers' names work as aliases."""

    model_type = "llada"
    attribute_map = {  # noqa: RUF012 - transformers reads a class-level dict
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
        "hidden_act": "activation_type",
        "tie_word_embeddings": "weight_tying",
    }

    vocab_size: int = 126464
    embedding_size: int | None = None
    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    max_sequence_length: int = 4096
    activation_type: str = "silu"
    block_type: str = "llama"
    block_group_size: int | None = 1
    layer_norm_type: str = "rms"
    rms_norm_eps: float = 1e-5
    rope: bool = True
    rope_theta: float = 500000.0
    init_std: float = 0.02
    attention_dropout: float | int | None = 0.0
    weight_tying: bool | None = False
    mask_token_id: int | None = None
    pad_token_id: int | None = 126081
    eos_token_id: int | list[int] | None = 126081

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill what official files leave null and refuse what is not implemented."""
        kwargs = apply_attribute_map(self, kwargs)
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        if self.mask_token_id is None and self.vocab_size > PUBLISHED_MASK_TOKEN_ID:
            self.mask_token_id = PUBLISHED_MASK_TOKEN_ID
        super().__post_init__(**kwargs)
        refuse(self, _SUPPORTED)
        set_rotary(self, self.rope_theta)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that official files have."""
        return official_dict(super().to_dict())

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config that `architectures` asks for: LLaDA-MoE is published as `llada` too."""
        from memdlm.backbones.llada_moe import LLaDAMoEConfig

        if LLaDAMoEConfig.architecture in (config_dict.get("architectures") or []):
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)


# `Any`: attention reads transformers' names, which are aliases here.
def _build_layer(config: Any, index: int) -> DecoderLayer:
    norms = tuple(RMSNorm(config.d_model, config.rms_norm_eps) for _ in range(2))
    mlp = GatedMLP(config.d_model, config.mlp_hidden_size, config.activation_type)
    return DecoderLayer(SplitAttention(config, index), mlp, norms)


class LLaDAPreTrainedModel(DiffusionPreTrainedModel):
    """Binds the config class."""

    config_class = LLaDAConfig


class LLaDAModel(DiffusionModel, LLaDAPreTrainedModel):
    """The layers of LLaDA."""


class LLaDAModelLM(DiffusionMaskedLM, LLaDAPreTrainedModel):
    """LLaDA with its head. Named as in official `architectures`, so that saved configs agree."""

    def __init__(self, config: LLaDAConfig) -> None:
        """Build the model of `config` with random weights."""
        model = LLaDAModel(
            config,
            _build_layer,
            RMSNorm(config.d_model, config.rms_norm_eps),
            LlamaRotaryEmbedding(cast(Any, config)),
            padding_idx=None,  # the official embedding trains the pad token: it is end-of-text too
        )
        super().__init__(config, model)


# Applied in this order when loading and backwards when saving: `ff_out` is the head at the top
# level and the down projection inside a block. PEFT puts adapter keys through the same table, where
# those we saved are native already, so a pattern must not match its own result.
OFFICIAL_NAMES = {
    r"model\.transformer\.blocks\.": "model.layers.",
    r"model\.transformer\.wte\.": "model.embed_tokens.",
    r"model\.transformer\.ln_f\.": "model.norm.",
    r"model\.transformer\.ff_out\.": "lm_head.",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.ff_norm\.": ".post_attention_layernorm.",
    r"\.attn_out\.": ".self_attn.o_proj.",
    r"(?<!self_attn)\.q_proj\.": ".self_attn.q_proj.",
    r"(?<!self_attn)\.k_proj\.": ".self_attn.k_proj.",
    r"(?<!self_attn)\.v_proj\.": ".self_attn.v_proj.",
    r"\.ff_proj\.": ".mlp.gate_proj.",
    r"(?<!mlp)\.up_proj\.": ".mlp.up_proj.",
    r"\.ff_out\.": ".mlp.down_proj.",
}
LLaDAForMaskedLM = LLaDAModelLM

register_family(LLaDAConfig, LLaDAModelLM, renames(OFFICIAL_NAMES))
