"""Quantises while a checkpoint is read, one matrix at a time: transformers' side of 4-bit weights.

The model is built on the meta device, its linear layers and experts are replaced there by 4-bit
ones, and each matrix of the files goes from the disk to the device and into its 4 bits before the
next is read; no layer is ever whole in bfloat16. Leans on transformers' young interfaces for
quantisers and weight conversion, as `checkpoint_layout` does, and on private parts of the latter.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, log_conversion_errors
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from memdlm.backbones.experts import Experts
from memdlm.backbones.quantization import COMPUTE_DTYPE, KEPT_LINEAR, QuantizationConfig, report
from memdlm.backbones.quantization.experts import STACKS, QuantizedExperts
from memdlm.backbones.quantization.four_bit import bitsandbytes
from memdlm.backbones.quantization.linear import four_bit_linear, linear_weight
from memdlm.errors import CheckpointError, ConfigError, UsageError

_METHOD = "memdlm_4bit"
_LOGGER = logging.getLogger("memdlm")


@register_quantization_config(_METHOD)
class FourBitConfig(BitsAndBytesConfig):
    """transformers' description of 4-bit weights, for our backbones and their experts."""

    def __init__(self, **kwargs: Any) -> None:
        """Take what `BitsAndBytesConfig` takes."""
        super().__init__(**kwargs)
        self.quant_method = _METHOD  # type: ignore[assignment]


def transformers_config(quantization: QuantizationConfig) -> FourBitConfig | None:
    """Return what `from_pretrained` wants for `quantization`; None to leave all as it is."""
    if not quantization.is_on:
        return None
    return FourBitConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=COMPUTE_DTYPE,
    )


def own_config(given: Any) -> FourBitConfig:
    """Return our form of a quantisation config a user gave to `from_pretrained`.

    transformers' own would leave the stacked experts as they are and round the routers.

    Raises:
        ConfigError: It is not 4-bit, or stores other than bytes.
    """
    if isinstance(given, FourBitConfig):
        return given
    if not isinstance(given, BitsAndBytesConfig) or not given.load_in_4bit:
        kind = type(given).__name__
        raise ConfigError(
            f"quantization_config: this {kind} would leave experts unquantised; use "
            "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')"
        )
    if given.bnb_4bit_quant_storage != torch.uint8:
        raise ConfigError("bnb_4bit_quant_storage: only torch.uint8 is supported; leave it out")
    return FourBitConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=given.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=given.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=given.bnb_4bit_compute_dtype,
        llm_int8_skip_modules=given.llm_int8_skip_modules,
    )


@register_quantizer(_METHOD)
class FourBitQuantizer(Bnb4BitHfQuantizer):
    """Replaces layers before loading and quantises their weights while they are read."""

    def __init__(self, quantization_config: FourBitConfig, **kwargs: Any) -> None:
        """Prepare to quantise as `quantization_config` says."""
        super().__init__(quantization_config, **kwargs)
        self.misfits: list[str] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to start without bitsandbytes.

        Raises:
            ConfigError: It is missing.
        """
        bitsandbytes()
        super().validate_environment(*args, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        # Under its real name transformers, accelerate and PEFT know what not to do with the model.
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        config = self.quantization_config
        settings = (
            config.bnb_4bit_quant_type,
            config.bnb_4bit_use_double_quant,
            config.bnb_4bit_compute_dtype,
        )
        kept = (*KEPT_LINEAR, *(config.llm_int8_skip_modules or ()))
        for name, module in list(model.named_modules()):
            if any(f".{name}".endswith(f".{last}") for last in kept):
                continue
            with torch.device("meta"):
                if type(module) is nn.Linear:
                    model.set_submodule(name, four_bit_linear(module, *settings))
                elif type(module) is Experts:
                    model.set_submodule(name, QuantizedExperts(module, *settings))

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Tell whether a weight is read to be quantised."""
        path, _, last = param_name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QuantizedExperts):
            return last in STACKS
        return isinstance(module, bitsandbytes().nn.Linear4bit) and last == "weight"

    def param_element_size(
        self, model: PreTrainedModel, param_name: str, param: torch.Tensor
    ) -> float:
        """Return the bytes of one element, as stored."""
        if param.dtype == torch.uint8:
            return 1.0
        return float(super().param_element_size(model, param_name, param))

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantises the weight of a linear layer."""
        return _QuantizeLinear(self)

    def update_weight_conversions(self, weight_conversions: Any, model: PreTrainedModel) -> Any:
        """Let experts be quantised one by one in place of stacking them first."""
        return [
            _QuantizeStack.of(conversion)
            if isinstance(conversion, WeightConverter)
            and conversion.target_patterns[0].rpartition(".")[2] in STACKS
            else conversion
            for conversion in weight_conversions
        ]

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self.misfits:
            more = f" and {len(self.misfits) - 5} more" if len(self.misfits) > 5 else ""
            raise CheckpointError(
                f"{model.config.name_or_path}: the weights do not fit {type(model).__name__} "
                f"(of another size: {', '.join(self.misfits[:5])}{more}): the files are "
                "incomplete or belong to another config.json; download or save them again"
            )
        # Loud, since it changes what the model computes: on stderr unless logging says otherwise.
        _LOGGER.warning("memdlm: %s", report(model).line())
        return super()._process_model_after_weight_loading(model, **kwargs)

    def is_serializable(self) -> bool:
        """Refuse to save: no other program reads the experts' 4 bits, and they are no better.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "a 4-bit model is not saved: save the adapter alone; to merge it, load the base "
            "without quantization"
        )


class _QuantizeLinear(ConversionOps):
    """Turns the weight of one linear layer into 4 bits."""

    def __init__(self, quantizer: FourBitQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        model: nn.Module = kwargs["model"]
        result: dict[str, Any] = {}
        config = self.quantizer.quantization_config
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module: Any = model.get_submodule(name.rpartition(".")[0])
            if weight.shape != (module.out_features, module.in_features):
                self.quantizer.misfits.append(name)
                continue
            result[name] = linear_weight(
                weight, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant, module
            )
        return result


class _MisfitError(Exception):
    """A matrix is of another size than the config says."""


class _QuantizeStack(WeightConverter):
    """Reads the experts of one layer one by one into their 4 bits."""

    @classmethod
    def of(cls, converter: WeightConverter) -> "_QuantizeStack":
        """Return a converter of the same keys as `converter`."""
        own = cls(
            list(converter._original_source_patterns),
            list(converter._original_target_patterns),
            operations=list(converter.operations),
        )
        own.scope_prefix = converter.scope_prefix
        own.base_model_prefix = converter.base_model_prefix
        return own

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, torch.Tensor]:
        # One callable per matrix: nothing is read before it is called.
        sources = [self.collected_tensors.pop(key, []) for key in self.source_patterns]
        path, _, stack = layer_name.rpartition(".")
        module = model.get_submodule(path)
        layout = module.layouts[stack]

        def matrices() -> Iterator[torch.Tensor]:
            if any(len(source) != layout.num_experts for source in sources):
                raise _MisfitError
            for parts in zip(*sources, strict=True):
                own = [read() for read in parts]
                rows = layout.out_features // len(own)
                if any(part.shape != (rows, layout.in_features) for part in own):
                    raise _MisfitError
                yield torch.cat(own)

        stored: dict[str, torch.Tensor] = {}
        with log_conversion_errors(layer_name, loading_info, (len(sources), layer_name)):
            try:
                for name, parameter in module.packed(stack, matrices()).items():
                    stored[f"{path}.{name}"] = parameter
            except _MisfitError:
                hf_quantizer.misfits.append(layer_name)
        return stored
