"""Dream: the architecture of Dream-7B (Base and Instruct), official layout in and out.

Qwen2's layers made bidirectional: biases on query, key and value, no qk-norm, full rotary
embeddings, grouped-query attention, untied head. Grown from an autoregressive model, the checkpoint
predicts at position i the token at i + 1; the shift happens here, so that callers see logits that
stand where their tokens do. Source: the checkpoint's own modelling code, frozen in
tests/fixtures/backbones/dream.
"""

from typing import Any, cast

from transformers import PreTrainedConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

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
    set_rotary,
)
from memdlm.backbones.decoder_layer import DecoderLayer
from memdlm.backbones.gated_mlp import GatedMLP
from memdlm.backbones.rms_norm import RMSNorm

PUBLISHED_MASK_TOKEN_ID = 151666

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "rope_scaling": (None,),
    "tie_word_embeddings": (False, None),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
}


class DreamConfig(PreTrainedConfig):
    """Configuration of Dream under its official names; defaults are those of Dream-7B."""

    model_type = "Dream"

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float | int = 1000000.0
    rope_scaling: dict[str, Any] | None = None
    attention_dropout: float | int | None = 0.0
    mask_token_id: int | None = None
    pad_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill what official files leave null and refuse what is not implemented."""
        kwargs = apply_attribute_map(self, kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_dropout is None:
            self.attention_dropout = 0.0
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
        return self.hidden_size // self.num_attention_heads


# `Any`: transformers' names are aliases here.
def _build_layer(config: Any, index: int) -> DecoderLayer:
    norms = tuple(RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
    mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
    return DecoderLayer(SplitAttention(config, index, has_qkv_bias=True), mlp, norms)


class DreamPreTrainedModel(DiffusionPreTrainedModel):
    """Binds the config class."""

    config_class = DreamConfig


class DreamBaseModel(DiffusionModel, DreamPreTrainedModel):
    """The layers of Dream.

    The official code hides padded positions as keys and as queries. Here a padded query still
    attends to the real keys: nothing reads its output, and no row of the softmax is empty.
    """


class DreamModel(DiffusionMaskedLM, DreamPreTrainedModel):
    """Dream with its head. Named as in official `architectures`, so that saved configs agree.

    Its logits are aligned with their tokens; the first position, which nothing precedes, repeats
    what the official recipe gives it: the logits computed there.
    """

    right_shift_logits = True

    def __init__(self, config: DreamConfig) -> None:
        """Build the model of `config` with random weights."""
        pad = config.pad_token_id
        model = DreamBaseModel(
            config,
            _build_layer,
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            Qwen2RotaryEmbedding(cast(Any, config)),
            # As in the official code: pad is never trained.
            padding_idx=pad if pad is not None and pad < config.vocab_size else None,
        )
        super().__init__(config, model)


DreamForMaskedLM = DreamModel

register_family(DreamConfig, DreamModel, [])
