"""4-bit weights without data: the layers that loading puts in place, with storage of their size.

The layers are the real ones, so what a step keeps and what it dequantises for the moment is theirs
to say. Only bitsandbytes' kind of parameter cannot be had without data; a plain one stands for it.
"""

from typing import Any, TypeGuard, cast

import torch
from torch import nn

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.quantization import (
    COMPUTE_DTYPE,
    SCALE_BLOCK_SIZE,
    QuantizationConfig,
    state_tensors,
)
from memdlm.backbones.quantization.four_bit import Scales


def quantize_outline(model: DiffusionMaskedLM, quantization: QuantizationConfig) -> None:
    """Replace the layers of `model`, on the meta device, that loading in 4 bits would replace.

    Raises:
        ConfigError: bitsandbytes is missing.
    """
    if not quantization.is_on:
        return
    # Imported here: it is part of loading and imports transformers' quantisers.
    from memdlm.backbones.quantization.loading import FourBitQuantizer, transformers_config

    # bitsandbytes makes a table when it is first needed and keeps it; so have it made with data.
    Scales.doubled(torch.ones(SCALE_BLOCK_SIZE))
    settings = transformers_config(quantization)
    assert settings is not None
    FourBitQuantizer(settings)._process_model_before_weight_loading(model)
    for module in model.modules():
        if is_four_bit(module) and module.bias is not None:
            module.bias = nn.Parameter(module.bias.to(COMPUTE_DTYPE), requires_grad=False)
    # As transformers says it after loading; PEFT chooses its layers by it.
    cast(Any, model).is_loaded_in_4bit = True


def is_four_bit(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Tell whether `module` is a linear layer of bitsandbytes in 4 bits."""
    return isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state")


def store_weight(layer: nn.Linear) -> list[torch.Tensor]:
    """Give a 4-bit linear layer storage as if it had been loaded; return all tensors of it.

    Called under `FakeTensorMode`.
    """
    from memdlm.backbones.quantization.linear import stored_matrix

    empty: Any = layer.weight
    kind, double = empty.quant_type, empty.compress_statistics
    weights = torch.empty(layer.out_features, layer.in_features, dtype=COMPUTE_DTYPE)
    packed, state = stored_matrix(weights, kind, double)
    stored: Any = nn.Parameter(packed, requires_grad=False)
    stored.quant_state, stored.bnb_quantized = state, True
    stored.quant_type, stored.compress_statistics = kind, double
    layer.weight = stored
    cast(Any, layer).quant_state = state
    return [stored, *state_tensors(state)]
