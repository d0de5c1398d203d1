"""4-bit weights: what a user can ask for, what excludes what, and what a model was made of.

NF4 (QLoRA, arXiv 2305.14314): weights in blocks of 64 share a scale, each being one of 16 quantiles
of a normal distribution. Double quantisation stores the scales in 8 bits, in blocks of 256, which
makes 4.13 bits per weight in place of 4.5. Products are computed in bfloat16 from weights
dequantised for the moment, in forward and again in backward; the stored bits never change, so
training needs an adapter. `loading` does the work while a checkpoint is read, `linear` and
`experts` hold what it stores.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from memdlm.errors import ConfigError

KINDS = ("none", "nf4")
COMPUTE_DTYPE = torch.bfloat16
BLOCK_SIZE = 64
SCALE_BLOCK_SIZE = 256

# Last part of the names of linear layers that keep their type. A rounded router would send tokens
# to other experts, and the head is as sensitive and as large as the embeddings, which stay too.
KEPT_LINEAR = ("lm_head", "gate")


@dataclass(frozen=True)
class QuantizationConfig:
    """How the frozen base weights are stored.

    Raises:
        ConfigError: `kind` is unknown.
    """

    kind: str = field(
        default="none",
        metadata={
            "help": "none; or nf4: linear layers and experts in 4 bits, computed in bfloat16. "
            "Embeddings, head, routers and norms stay bfloat16. Training then needs an adapter."
        },
    )
    double: bool = field(
        default=True,
        metadata={"help": "Store the scales of nf4 in 8 bits too: 4.13 bits a weight, not 4.5."},
    )

    def __post_init__(self) -> None:
        """Check the kind."""
        if self.kind not in KINDS:
            raise ConfigError(f"quantization.kind: {self.kind!r} is not one of {', '.join(KINDS)}")

    @property
    def is_on(self) -> bool:
        """Whether anything is quantised."""
        return self.kind != "none"


def as_quantization(value: "QuantizationConfig | str | None") -> QuantizationConfig:
    """Return a config for a config, the name of a kind, or None."""
    if isinstance(value, QuantizationConfig):
        return value
    return QuantizationConfig() if value is None else QuantizationConfig(value)


def check_dtype(quantization: QuantizationConfig, dtype: torch.dtype | str) -> None:
    """Refuse weights of another type beside 4-bit ones.

    Raises:
        ConfigError: `dtype` is neither auto nor bfloat16.
    """
    name = str(dtype).removeprefix("torch.")
    if quantization.is_on and name not in ("auto", "bfloat16"):
        raise ConfigError(
            f"dtype: {name} excludes quantization.kind {quantization.kind}, which computes in "
            "bfloat16 and keeps every other weight so; use dtype auto or bfloat16"
        )


def loading_arguments(
    quantization: QuantizationConfig, device: torch.device | str
) -> dict[str, Any]:
    """Return what `from_pretrained` needs to quantise while it loads onto `device`.

    Raises:
        ConfigError: bitsandbytes is missing.
    """
    if not quantization.is_on:
        return {}
    # Imported here: both import this file.
    from memdlm.backbones.quantization.four_bit import bitsandbytes
    from memdlm.backbones.quantization.loading import transformers_config

    bitsandbytes()
    return {
        "quantization_config": transformers_config(quantization),
        "device_map": {"": torch.device(device)},
        "dtype": COMPUTE_DTYPE,
    }


def stored_bytes(num_weights: int, double: bool) -> float:
    """Return the bytes that `num_weights` take in NF4, scales included."""
    blocks = num_weights / BLOCK_SIZE
    return num_weights / 2 + (blocks * (1 + 4 / SCALE_BLOCK_SIZE) if double else blocks * 4)


@dataclass(frozen=True)
class QuantizationReport:
    """What became of a model's weights.

    Attributes:
        kind: "nf4" or "fp4"; "none" for a model without 4-bit weights.
        double: Whether the scales are quantised too.
        num_linear: Linear layers in 4 bits.
        num_stacks: Stacks of experts in 4 bits.
        quantized_weights: Weights in them.
        total_weights: Weights of the model, these included.
        quantized_bytes: What the 4-bit weights take, with their scales.
        kept_bytes: What the others take.
        kept: Kinds of modules that keep their type.
    """

    kind: str
    double: bool
    num_linear: int
    num_stacks: int
    quantized_weights: int
    total_weights: int
    quantized_bytes: int
    kept_bytes: int
    kept: tuple[str, ...]

    def line(self) -> str:
        """Return the line that tells the user."""
        if self.kind == "none":
            return "no weight is quantised"
        name = self.kind.upper() + (" (double)" if self.double else "")
        stacks = f" and {self.num_stacks} stacks of experts" if self.num_stacks else ""
        return (
            f"4-bit {name}: {self.num_linear} linear layers{stacks}, "
            f"{_count(self.quantized_weights)} of {_count(self.total_weights)} weights in "
            f"{_size(self.quantized_bytes)}; not quantised: {', '.join(self.kept)} "
            f"({_size(self.kept_bytes)})"
        )


def is_quantized(model: nn.Module) -> bool:
    """Tell whether `model` holds 4-bit weights."""
    return any(True for _ in _quantized(model))


def report(model: nn.Module) -> QuantizationReport:
    """Count what is quantised in `model` and what is not; adapters are not counted."""
    parts = list(_quantized(model))
    held = {id(parameter) for part in parts for parameter in part.parameters}
    others = {
        id(parameter): (name, parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) not in held and ".lora_" not in name
    }
    quantized_weights = sum(part.num_weights for part in parts)
    kept: dict[str, None] = {}
    for name, _ in others.values():
        kept[_kind_of(name)] = None
    return QuantizationReport(
        kind=parts[0].kind if parts else "none",
        double=bool(parts) and parts[0].double,
        num_linear=sum(part.is_linear for part in parts),
        num_stacks=sum(not part.is_linear for part in parts),
        quantized_weights=quantized_weights,
        total_weights=quantized_weights + sum(p.numel() for _, p in others.values()),
        quantized_bytes=sum(part.num_bytes for part in parts),
        kept_bytes=sum(p.numel() * p.element_size() for _, p in others.values()),
        kept=tuple(sorted(kept, key=_KINDS_OF_MODULES.index)),
    )


@dataclass(frozen=True)
class _Part:
    """One module with 4-bit weights."""

    kind: str
    double: bool
    is_linear: bool
    num_weights: int
    num_bytes: int
    parameters: tuple[torch.Tensor, ...]


def _quantized(model: nn.Module) -> Iterator[_Part]:
    from memdlm.backbones.quantization.experts import QuantizedExperts

    for module in model.modules():
        if isinstance(module, QuantizedExperts):
            parameters = tuple(module.parameters())
            num_bytes = sum(p.numel() * p.element_size() for p in parameters)
            layout = module.layout
            yield _Part(
                layout.kind, layout.double, False, module.num_weights, num_bytes, parameters
            )
        # By its state and not by its class, which only the import of bitsandbytes could give.
        elif isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state"):
            state: Any = module.weight.quant_state
            num_weights = module.in_features * module.out_features
            tensors = [] if state is None else state_tensors(state)
            num_bytes = sum(t.numel() * t.element_size() for t in (module.weight, *tensors))
            double = state is not None and state.nested
            kind = "nf4" if state is None else state.quant_type
            yield _Part(kind, double, True, num_weights, num_bytes, (module.weight,))


def state_tensors(state: Any) -> list[torch.Tensor]:
    """Return the tensors of a bitsandbytes `QuantState`, those of nested scales included."""
    found = [t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor)]
    return found if state.state2 is None else found + state_tensors(state.state2)


_KINDS_OF_MODULES = ("embeddings", "head", "routers", "norms", "biases", "other weights")


def _kind_of(name: str) -> str:
    """Return which of `_KINDS_OF_MODULES` the parameter `name` belongs to."""
    parts = name.split(".")
    if "embed_tokens" in parts:
        return "embeddings"
    if "lm_head" in parts:
        return "head"
    if "gate" in parts or parts[-1] == "expert_bias":
        return "routers"
    if any("norm" in part for part in parts):
        return "norms"
    return "biases" if parts[-1] == "bias" else "other weights"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"
