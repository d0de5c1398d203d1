"""Which way of decoding a model and a config ask for. Knows no loop."""

from torch import nn

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.wrapping import backbone_of
from memdlm.errors import ConfigError
from memdlm.sampling.config import SamplingConfig


def choose_decoder(model: nn.Module, config: SamplingConfig) -> str:
    """Return `masked` or `block`.

    Raises:
        ConfigError: The model cannot be decoded as `config` asks.
    """
    backbone = backbone_of(model)
    offers_blocks = backbone is not None and "block_causal" in backbone.attentions
    decoder = config.decoder
    if decoder == "auto":
        decoder = "block" if offers_blocks else "masked"
    if decoder == "block" and not offers_blocks:
        raise ConfigError(
            "sampling.decoder: block needs a model with block-causal attention (LLaDA2.x), and "
            f"{type(backbone or model).__name__} has none; use masked"
        )
    excluded = config.masked_only if decoder == "block" else config.block_only
    if excluded:
        name = excluded[0]
        remedy = "set sampling.decoder: masked" if decoder == "block" else "use it with LLaDA2.x"
        raise ConfigError(
            f"sampling.{name}: {getattr(config, name)!r} is not possible in {decoder} decoding, "
            f"which this model gets; {remedy} or leave it out"
        )
    if config.cache in ("prefix", "dual"):
        _check_approximate(backbone, config.cache)
    return decoder


def _check_approximate(backbone: DiffusionMaskedLM | None, cache: str) -> None:
    attention = None if backbone is None else getattr(backbone.config, "attention", "full")
    if attention != "full":
        found = "is none of memdlm's" if attention is None else f"has attention={attention!r}"
        raise ConfigError(
            f"sampling.cache: {cache} needs a backbone with full attention, and the model {found}; "
            "use none"
        )
