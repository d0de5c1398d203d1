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


def _no_extras(tiny: TinySizes) -> dict[str, Any]:
    return {}


def _experts(tiny: TinySizes) -> dict[str, Any]:
    return {
        "moe_intermediate_size": tiny.expert_width,
        "num_experts": tiny.num_experts,
        "num_experts_per_tok": tiny.num_experts_per_token,
    }


def _grouped_experts(tiny: TinySizes) -> dict[str, Any]:
    """Return a dense layer, then experts in groups of two."""
    groups = 1 if tiny.num_experts % 2 else tiny.num_experts // 2
    needed = min(groups, (tiny.num_experts_per_token + 1) // 2)
    return {
        **_experts(tiny),
        "n_group": groups,
        "topk_group": max(groups // 2, needed),
        "partial_rotary_factor": 1.0,  # half of a tiny head may be odd
    }


@dataclass(frozen=True)
class TinyFamily:
    """How a family is built, and the fields of its config that the others lack."""

    config_class: Callable[..., Any]
    model_class: Callable[[Any], DiffusionMaskedLM]
    extras: Callable[[TinySizes], dict[str, Any]] = _no_extras


TINY_FAMILIES: dict[str, TinyFamily] = {
    "llada": TinyFamily(LLaDAConfig, LLaDAForMaskedLM),
    "llada_moe": TinyFamily(LLaDAMoEConfig, LLaDAMoEForMaskedLM, _experts),
    "llada2": TinyFamily(LLaDA2Config, LLaDA2ForMaskedLM, _grouped_experts),
    "dream": TinyFamily(DreamConfig, DreamForMaskedLM),
}


def tiny_config(
    family: str, sizes: TinySizes | None = None, rope_theta: float = 10_000.0, **token_ids: int
) -> Any:
    """Return the config of a tiny network.

    Args:
        family: A key of `TINY_FAMILIES`.
        sizes: Its sizes; None for the defaults.
        rope_theta: Base of the rotary embeddings.
        **token_ids: `vocab_size`, `mask_token_id`, `pad_token_id` and `eos_token_id`.

    Raises:
        ConfigError: `family` is not in `TINY_FAMILIES`.
    """
    if family not in TINY_FAMILIES:
        raise ConfigError(f"tiny.family: {family!r} is not one of {', '.join(TINY_FAMILIES)}")
    tiny, row = sizes or TinySizes(), TINY_FAMILIES[family]
    return row.config_class(
        # Every family takes transformers' names beside its official ones.
        hidden_size=tiny.width,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        num_key_value_heads=tiny.num_heads,
        intermediate_size=tiny.mlp_width,
        max_position_embeddings=tiny.context_length,
        initializer_range=tiny.init_std,
        rope_theta=rope_theta,
        **token_ids,
        **row.extras(tiny),
    )


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
    ids = {}
    for name in ("mask_token_id", "pad_token_id", "eos_token_id"):
        ids[name] = getattr(tokenizer, name)
        if ids[name] is None:
            raise DataError(
                f"the tokenizer has no {name.removesuffix('_id')}; set it, or build a tokenizer "
                "with memdlm.data.tokenizer.build_word_tokenizer"
            )
    config = tiny_config(family, sizes, vocab_size=len(tokenizer), **ids)
    with preserved_rng(torch.device("cpu")):
        torch.manual_seed(derive_seed(seed, "tiny_weights"))
        return TINY_FAMILIES[family].model_class(config)
