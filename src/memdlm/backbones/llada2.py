"""LLaDA2.x: the architecture of LLaDA2.0 and 2.1, mini and flash, official layout in and out.

Fused query-key-value projection, qk-norm, partial rotary embeddings, first layers dense, then
routed experts beside shared ones. The router scores every expert by an fp32 sigmoid and picks by
score plus bias inside the best groups; the bias never reaches the weights. Attention is full unless
the config says block-causal. Source: the checkpoint's own modelling code, frozen in
tests/fixtures/backbones/llada2 and llada2_variant.
"""

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding
from transformers.utils.generic import maybe_autocast

from memdlm.backbones.attention import Attention, Heads
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
    register_renamed,
    renames,
    set_rotary,
)
from memdlm.backbones.decoder_layer import DecoderLayer
from memdlm.backbones.experts import Experts
from memdlm.backbones.gated_mlp import GatedMLP
from memdlm.backbones.rms_norm import RMSNorm
from memdlm.errors import CheckpointError, ConfigError

PUBLISHED_MASK_TOKEN_ID = 156895
ATTENTIONS = ("full", "block_causal")

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "score_function": ("sigmoid", None),
    "use_qk_norm": (True, None),
    "norm_topk_prob": (True, None),
    "norm_head": (False, None),
    "rope_scaling": (None,),
    "tie_word_embeddings": (False, None),
    "use_sliding_window": (False, None),
    "embedding_dropout": (0.0, None),
    "output_dropout": (0.0, None),
    "attention": ATTENTIONS,
}
# Ours, unknown to official readers: written only where they differ from what those readers do.
_OWN_DEFAULTS = {"attention": "full", "block_length": 32}


class LLaDA2Config(PreTrainedConfig):
    """Configuration of LLaDA2.x under its official names; defaults are those of 2.1-mini.

    Two fields are ours: `attention`, "full" (as the paper trains and adapts) or "block_causal" (as
    the checkpoints decode: a token sees its own block and earlier ones), and `block_length`, the
    tokens of such a block. Both may be changed on a built model; the next forward follows.
    """

    model_type = "llada2_moe"

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 20
    first_k_dense_replace: int | None = 1
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int | None = 1
    n_group: int | None = 8
    topk_group: int | None = 4
    routed_scaling_factor: float | int | None = 2.5
    moe_router_enable_expert_bias: bool | None = True
    score_function: str | None = "sigmoid"
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float | int = 600000.0
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float | int | None = 0.5
    use_bias: bool | None = False
    use_qkv_bias: bool | None = False
    use_qk_norm: bool | None = True
    attention_dropout: float | int | None = 0.0
    attention: str = "full"
    block_length: int = 32
    mask_token_id: int | None = None
    pad_token_id: int | None = 156892
    eos_token_id: int | list[int] | None = 156892

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill what official files leave null and refuse what is not implemented."""
        kwargs = apply_attribute_map(self, kwargs)
        usual = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "first_k_dense_replace": 0,
            "num_shared_experts": 0,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "attention_dropout": 0.0,
        }
        for name, value in usual.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.mask_token_id is None and self.vocab_size > PUBLISHED_MASK_TOKEN_ID:
            self.mask_token_id = PUBLISHED_MASK_TOKEN_ID
        super().__post_init__(**kwargs)
        refuse(self, _SUPPORTED)
        _check_groups(self)
        set_rotary(self, self.rope_theta, self.partial_rotary_factor)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that official files have, and ours where they say something new."""
        fields = official_dict(super().to_dict())
        return {
            name: value
            for name, value in fields.items()
            if name not in _OWN_DEFAULTS or value != _OWN_DEFAULTS[name]
        }


def _check_groups(config: Any) -> None:
    size, remainder = divmod(config.num_experts, config.n_group)
    reachable = min(config.topk_group, config.n_group) * size
    if remainder or config.topk_group > config.n_group or config.num_experts_per_tok > reachable:
        raise CheckpointError(
            f"{config.model_type} config: {config.num_experts} experts in n_group="
            f"{config.n_group} groups of which topk_group={config.topk_group} are kept cannot give "
            f"num_experts_per_tok={config.num_experts_per_tok}; correct these fields in config.json"
        )


class FusedAttention(Attention):
    """Attention over one projection that holds query, key and value heads in turn."""

    def __init__(self, config: Any, index: int) -> None:
        """Build the attention of layer `index`."""
        super().__init__(config, index)
        width, heads = config.hidden_size, self.num_heads + 2 * self.num_key_value_heads
        self.query_key_value = nn.Linear(
            width, heads * self.head_dim, bias=bool(config.use_qkv_bias)
        )
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(self.num_heads * self.head_dim, width, bias=bool(config.use_bias))

    def heads(self, hidden: torch.Tensor, positions: torch.Tensor | None = None) -> Heads:
        """See `Attention`."""
        heads = self.query_key_value(hidden).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split(
            [self.num_heads, self.num_key_value_heads, self.num_key_value_heads], dim=-2
        )
        if positions is not None:
            index = positions[..., None, None].expand(-1, -1, *query.shape[2:])
            query = query.gather(1, index)
        return self.query_layernorm(query), self.key_layernorm(key), value

    def project(self, attended: torch.Tensor) -> torch.Tensor:
        """See `Attention`."""
        projected: torch.Tensor = self.dense(attended.flatten(2))
        return projected


class Router(nn.Module):
    """Scores of the routed experts; no linear layer in the official code, so adapters pass it by.

    `weight` is [E, H]; `expert_bias` [E] balances the load and takes no gradient.
    """

    def __init__(self, config: Any) -> None:
        """Allocate the weights; initialisation is the model's."""
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_groups, self.kept_groups = config.n_group, config.topk_group
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        has_bias = config.moe_router_enable_expert_bias
        self.expert_bias: torch.Tensor | None
        self.register_buffer("expert_bias", torch.zeros(config.num_experts) if has_bias else None)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [T, E] for states [T, H], whatever the precision around."""
        with maybe_autocast(device_type=tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.weight.float())

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the chosen experts [T, K] and their fp32 weights for logits [T, E]."""
        scores = logits.sigmoid()
        ranking = scores.detach()
        if self.expert_bias is not None:
            ranking = ranking + self.expert_bias.float()
        if self.kept_groups < self.num_groups:
            groups = ranking.unflatten(-1, (self.num_groups, -1))  # [T, groups, E per group]
            best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
            kept = best.topk(self.kept_groups, dim=-1).indices
            is_dropped = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, False)
            ranking = groups.masked_fill(is_dropped[..., None], -torch.inf).flatten(-2)
        chosen = ranking.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        return chosen, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.scaling


class SparseBlock(nn.Module):
    """Router, routed experts and the shared ones that every token visits."""

    def __init__(self, config: Any) -> None:
        """Build the block of `config`."""
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(
            config.num_experts, config.hidden_size, config.moe_intermediate_size, config.hidden_act
        )
        self.shared_experts: nn.Module | None = None
        if config.num_shared_experts:
            width = config.moe_intermediate_size * config.num_shared_experts
            self.shared_experts = GatedMLP(config.hidden_size, width, config.hidden_act)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the mixture [B, P, H] for states [B, P, H], rows kept apart for fast weights."""
        tokens = hidden.flatten(0, 1)
        chosen, weights = self.gate.choose(self.gate(tokens))
        mixture = self.experts(tokens, chosen, weights.to(hidden.dtype)).view_as(hidden)
        return mixture if self.shared_experts is None else mixture + self.shared_experts(hidden)


# `Any`: transformers' names are aliases here.
def _build_layer(config: Any, index: int) -> DecoderLayer:
    norms = tuple(RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
    mlp: nn.Module
    if index < config.first_k_dense_replace:
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
    else:
        mlp = SparseBlock(config)
    return DecoderLayer(FusedAttention(config, index), mlp, norms)


class LLaDA2PreTrainedModel(DiffusionPreTrainedModel):
    """Binds the config class and keeps the selection bias exact in half precision."""

    config_class = LLaDA2Config
    # Published files hold it in fp32 beside bf16 weights: rounded, it would pick other experts.
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012 - as transformers reads it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.expert_bias is not None:
                nn.init.zeros_(module.expert_bias)


class LLaDA2Model(DiffusionModel, LLaDA2PreTrainedModel):
    """The layers of LLaDA2.x, attending as the config declares."""

    def _layer_mask(
        self, attention_mask: torch.Tensor | None, hidden: torch.Tensor
    ) -> torch.Tensor | None:
        """Add the blocks to what the caller hides; a prepared 4D mask is taken as it is."""
        if self.config.attention not in ATTENTIONS:
            raise ConfigError(
                f"model.config.attention: {self.config.attention!r} is not one of "
                f"{', '.join(ATTENTIONS)}"
            )
        is_prepared = attention_mask is not None and attention_mask.dim() == 4
        if self.config.attention == "block_causal" and not is_prepared:
            batch, length = hidden.shape[:2]
            block = torch.arange(length, device=hidden.device) // self.config.block_length
            visible = (block[:, None] >= block).expand(batch, 1, -1, -1)
            if attention_mask is not None:
                visible = visible & attention_mask.bool()[:, None, None, :]
            attention_mask = visible
        return super()._layer_mask(attention_mask, hidden)


class LLaDA2MoeModelLM(DiffusionMaskedLM, LLaDA2PreTrainedModel):
    """LLaDA2.x with its head. Named as in official `architectures`, so saved configs agree."""

    attentions = ATTENTIONS

    def __init__(self, config: LLaDA2Config) -> None:
        """Build the model of `config` with random weights."""
        pad = config.pad_token_id
        model = LLaDA2Model(
            config,
            _build_layer,
            RMSNorm(config.hidden_size, config.rms_norm_eps),
            Glm4MoeRotaryEmbedding(cast(Any, config)),
            # As in the official code: pad is never trained.
            padding_idx=pad if pad is not None and pad < config.vocab_size else None,
        )
        super().__init__(config, model)


# Applied when loading and backwards when saving; see memdlm.backbones.llada.OFFICIAL_NAMES.
OFFICIAL_NAMES = {
    r"model\.word_embeddings\.": "model.embed_tokens.",
    r"\.attention\.": ".self_attn.",
}
LLaDA2ForMaskedLM = LLaDA2MoeModelLM

register_family(LLaDA2Config, LLaDA2MoeModelLM, [*renames(OFFICIAL_NAMES), *fused_experts()])
# What MemDLM's and dllm's own copies of the code make users write into config.json for LLaDA2.1.
for renamed in ("llada2_moe_21", "llada21_moe"):
    register_renamed(renamed, LLaDA2Config)
