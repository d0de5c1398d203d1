"""Small networks with random weights, for tests, trials and the quickstart: real families, tiny.

Knows token ids and sizes; the tokenizer comes from the caller. A new family is one table row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.dream import DreamConfig, DreamForMaskedLM
from memdlm.backbones.llada import LLaDAConfig, LLaDAForMaskedLM
from memdlm.backbones.llada2 import LLaDA2Config, LLaDA2ForMaskedLM
from memdlm.backbones.llada_moe import LLaDAMoEConfig, LLaDAMoEForMaskedLM
from memdlm.errors import ConfigError, DataError
from memdlm.seeding import derive_seed, preserved_rng

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TinySizes:
    """Sizes of a tiny network; the defaults train on two CPU cores in minutes.

    Raises:
        ConfigError: A size is below 1, or sizes do not fit together.
    """

    width: int = field(default=64, metadata={"help": "Width of the hidden states."})
    num_layers: int = field(default=4, metadata={"help": "Number of layers."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads; must divide `width`."})
    mlp_width: int = field(
        default=256, metadata={"help": "Inner width of a dense feed-forward layer."}
    )
    context_length: int = field(
        default=4096, metadata={"help": "Longest input in tokens, prompt and response together."}
    )
    num_experts: int = field(
        default=8, metadata={"help": "llada_moe, llada2: routed experts of a layer."}
    )
    num_experts_per_token: int = field(
        default=2, metadata={"help": "llada_moe, llada2: experts that a token visits."}
    )
    expert_width: int = field(
        default=64, metadata={"help": "llada_moe, llada2: inner width of an expert."}
    )
    init_std: float = field(
        default=0.02, metadata={"help": "Standard deviation of the initial weights."}
    )

    def __post_init__(self) -> None:
        """Check every size, then how they fit together."""
        for name, value in vars(self).items():
            least = 0 if name == "init_std" else 1
            if value < least:
                raise ConfigError(f"tiny.sizes.{name}: {value} is too small; use at least {least}")
        if self.width % self.num_heads or self.width // self.num_heads % 2:
            raise ConfigError(
                f"tiny.sizes.num_heads: width {self.width} over {self.num_heads} heads must give "
                "an even whole number (rotary embeddings pair the dimensions of a head)"
            )
        if self.num_experts_per_token > self.num_experts:
            raise ConfigError(
                f"tiny.sizes.num_experts_per_token: {self.num_experts_per_token} exceeds "
                f"num_experts={self.num_experts}"
            )


def tiny_llada_config(
    vocab_size: int, mask_token_id: int, pad_token_id: int, eos_token_id: int, **sizes: Any
) -> LLaDAConfig:
    """Return a dense config of `TinySizes(**sizes)` for these tokens."""
    tiny = TinySizes(**sizes)
    return LLaDAConfig(
        vocab_size=vocab_size,
        d_model=tiny.width,
        n_layers=tiny.num_layers,
        n_heads=tiny.num_heads,
        mlp_hidden_size=tiny.mlp_width,
        max_sequence_length=tiny.context_length,
        rope_theta=10_000.0,
        init_std=tiny.init_std,
        mask_token_id=mask_token_id,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )


def tiny_llada_moe_config(
    vocab_size: int, mask_token_id: int, pad_token_id: int, eos_token_id: int, **sizes: Any
) -> LLaDAMoEConfig:
    """Return a mixture-of-experts config of `TinySizes(**sizes)` for these tokens."""
    tiny = TinySizes(**sizes)
    return LLaDAMoEConfig(
        vocab_size=vocab_size,
        hidden_size=tiny.width,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        dense_intermediate_size=tiny.mlp_width,
        expert_intermediate_size=tiny.expert_width,
        num_experts=tiny.num_experts,
        num_experts_per_tok=tiny.num_experts_per_token,
        max_position_embeddings=tiny.context_length,
        rope_theta=10_000.0,
        initializer_range=tiny.init_std,
        mask_token_id=mask_token_id,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )


def tiny_llada2_config(
    vocab_size: int, mask_token_id: int, pad_token_id: int, eos_token_id: int, **sizes: Any
) -> LLaDA2Config:
    """Return a config of `TinySizes(**sizes)`: a dense layer, then experts in groups of two."""
    tiny = TinySizes(**sizes)
    groups = 1 if tiny.num_experts % 2 else tiny.num_experts // 2
    needed = min(groups, (tiny.num_experts_per_token + 1) // 2)
    return LLaDA2Config(
        vocab_size=vocab_size,
        hidden_size=tiny.width,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        num_key_value_heads=tiny.num_heads,
        intermediate_size=tiny.mlp_width,
        moe_intermediate_size=tiny.expert_width,
        num_experts=tiny.num_experts,
        num_experts_per_tok=tiny.num_experts_per_token,
        n_group=groups,
        topk_group=max(groups // 2, needed),
        partial_rotary_factor=1.0,  # half of a tiny head may be odd
        max_position_embeddings=tiny.context_length,
        rope_theta=10_000.0,
        initializer_range=tiny.init_std,
        mask_token_id=mask_token_id,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )


def tiny_dream_config(
    vocab_size: int, mask_token_id: int, pad_token_id: int, eos_token_id: int, **sizes: Any
) -> DreamConfig:
    """Return a dense config of `TinySizes(**sizes)` with biases and shifted logits."""
    tiny = TinySizes(**sizes)
    return DreamConfig(
        vocab_size=vocab_size,
        hidden_size=tiny.width,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        num_key_value_heads=tiny.num_heads,
        intermediate_size=tiny.mlp_width,
        max_position_embeddings=tiny.context_length,
        rope_theta=10_000.0,
        initializer_range=tiny.init_std,
        mask_token_id=mask_token_id,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )


TINY_FAMILIES: dict[str, tuple[Callable[..., Any], Callable[[Any], DiffusionMaskedLM]]] = {
    "llada": (tiny_llada_config, LLaDAForMaskedLM),
    "llada_moe": (tiny_llada_moe_config, LLaDAMoEForMaskedLM),
    "llada2": (tiny_llada2_config, LLaDA2ForMaskedLM),
    "dream": (tiny_dream_config, DreamForMaskedLM),
}


def build_tiny(
    family: str,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int = 0,
    sizes: TinySizes | None = None,
) -> DiffusionMaskedLM:
    """Build a tiny model for `tokenizer`, float32, with random weights that `seed` decides.

    The global random state is afterwards as before.

    Raises:
        ConfigError: `family` is not in `TINY_FAMILIES`.
        DataError: The tokenizer lacks a mask, padding or end-of-text token.
    """
    if family not in TINY_FAMILIES:
        raise ConfigError(f"tiny.family: {family!r} is not one of {', '.join(TINY_FAMILIES)}")
    ids = {}
    for name in ("mask_token_id", "pad_token_id", "eos_token_id"):
        ids[name] = getattr(tokenizer, name)
        if ids[name] is None:
            raise DataError(
                f"the tokenizer has no {name.removesuffix('_id')}; set it, or build a tokenizer "
                "with memdlm.data.tokenizer.build_word_tokenizer"
            )
    build_config, model_class = TINY_FAMILIES[family]
    config = build_config(vocab_size=len(tokenizer), **ids, **vars(sizes or TinySizes()))
    with preserved_rng(torch.device("cpu")):
        torch.manual_seed(derive_seed(seed, "tiny_weights"))
        return model_class(config)
