"""Everything that a preflight can say about one training set-up, in one object."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.quantization import QuantizationConfig
from memdlm.errors import ConfigError
from memdlm.planning.gpus import reserve
from memdlm.planning.quantized import quantize_outline
from memdlm.planning.simulation import StepFigures, simulate_step
from memdlm.planning.sizes import ModelSizes, count_parameters, count_trained
from memdlm.planning.worst_case import worst_step
from memdlm.training.config import MemDLMConfig

Wrap = Callable[[DiffusionMaskedLM], nn.Module]


@dataclass(frozen=True)
class Plan:
    """What training needs, per device and without sharding.

    Attributes:
        model: Class of the network.
        dtype: Type of its weights.
        quantization: How the larger ones of them are stored in place of that, e.g. nf4.
        autocast: Type that products are computed in under autocast; None without.
        gradient_checkpointing: Whether layers are computed again in the backward pass.
        batch_size: Rows of a micro-batch.
        length: Tokens of a row.
        response: Masked tokens of a row.
        micro_batches: Micro-batches of an optimizer step.
        sizes: Numbers of parameters.
        step: Memory and FLOPs of one optimizer step.
    """

    model: str
    dtype: str
    quantization: str
    autocast: str | None
    gradient_checkpointing: bool
    batch_size: int
    length: int
    response: int
    micro_batches: int
    sizes: ModelSizes
    step: StepFigures

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `memdlm plan --json` prints it; sizes of memory in bytes."""
        own = asdict(self)
        step, sizes = own.pop("step"), own.pop("sizes")
        peak = self.step.peak_bytes
        return {
            **own,
            "parameters": {
                **sizes,
                "fast_per_memory": self.step.num_fast,
                "memories": self.step.num_memories,
            },
            "memory": {
                "peak": peak,
                "parts_at_peak": step["peak"],
                "parts_largest": step["largest"],
                "reserve": reserve(peak),
            },
            "flops_per_optimizer_step": self.step.flops,
        }


def make_plan(
    base: DiffusionMaskedLM,
    wrap: Wrap,
    arguments: MemDLMConfig,
    length: int,
    response: int | None = None,
    quantization: QuantizationConfig | None = None,
    autocast: str | None = None,
) -> Plan:
    """Plan training of `base` on full rows of `length` tokens.

    Args:
        base: The network on the meta device; it is used up.
        wrap: Puts the outer adapter on it, or returns it as it is.
        arguments: Settings of the Trainer, with `use_cpu`.
        length: Tokens of a row.
        response: Masked tokens of a row; None for all but the first, the worst case.
        quantization: How the weights of `base` are stored; None for as they are.
        autocast: What to call the type of autocast, if not what `arguments` says.

    Raises:
        ConfigError: `response` does not fit into `length`, or a setting cannot be planned.
    """
    masked = length - 1 if response is None else response
    if not 1 <= masked <= length:
        raise ConfigError(f"--response: {masked} is out of range; use 1 to {length}")
    sizes = count_parameters(base)
    dtype = str(base.dtype).removeprefix("torch.")
    if quantization is not None:
        quantize_outline(base, quantization)
    own = {id(parameter) for parameter in base.parameters()}
    model = wrap(base)
    adapter = frozenset(name for name, p in model.named_parameters() if id(p) not in own)
    batch_size = arguments.per_device_train_batch_size
    step = worst_step(batch_size, length, masked, arguments.objective, arguments.memory)
    return Plan(
        model=type(base).__name__,
        dtype=dtype,
        quantization="none" if quantization is None else quantization.kind,
        autocast=autocast or ("bfloat16" if arguments.bf16 else None),
        gradient_checkpointing=bool(arguments.activation_checkpointing),
        batch_size=batch_size,
        length=length,
        response=masked,
        micro_batches=arguments.gradient_accumulation_steps,
        sizes=replace(sizes, trained=count_trained(model)),
        step=simulate_step(model, adapter, arguments, step),
    )
