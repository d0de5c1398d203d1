"""4-bit linear layers: bitsandbytes' own, and ours where a row is no whole number of blocks.

bitsandbytes' CPU kernel (0.50) dequantises such rows wrongly. No published checkpoint has them;
small models do.
"""

from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from memdlm.backbones.quantization import BLOCK_SIZE, SCALE_BLOCK_SIZE
from memdlm.backbones.quantization.four_bit import Scales, bitsandbytes, dequantize, quantize


def four_bit_linear(
    linear: nn.Linear, kind: str, double: bool, compute_dtype: torch.dtype
) -> nn.Module:
    """Return a 4-bit layer shaped as `linear`, whose weights are not read, on the current device.

    Args:
        linear: On any device, the meta device included.
        kind: "nf4" or "fp4".
        double: Store the scales in 8 bits too.
        compute_dtype: In which weights are dequantised and multiplied.
    """
    library = bitsandbytes()
    is_whole = linear.in_features % BLOCK_SIZE == 0
    layer: Any = (library.nn.Linear4bit if is_whole else _odd_class())(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype,
        compress_statistics=double,
        quant_type=kind,
    )
    # On some processors bitsandbytes rearranges the weight at the first inference and can compute
    # no gradient from then on, which the inner loop needs in evaluation too.
    layer.support_avx512bf16_for_cpu = False
    layer.requires_grad_(False)
    return cast(nn.Module, layer)


@cache
def _odd_class() -> type[nn.Module]:
    """Return the class for rows that are no whole number of blocks; bitsandbytes must be there."""

    class OddLinear4bit(bitsandbytes().nn.Linear4bit):  # type: ignore[misc]
        """`Linear4bit` that dequantises all weights as one run of blocks."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            outputs: torch.Tensor = _Product.apply(
                inputs.to(self.compute_dtype), self.weight, self.weight.quant_state, bias
            )
            return outputs.to(inputs.dtype)

    return OddLinear4bit


class _Product(torch.autograd.Function):
    """The product with a stored matrix; its backward dequantises again."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        packed: torch.Tensor,
        state: Any,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.state = state
        return F.linear(inputs, dequantized_weight(packed, state).to(inputs.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        weight = dequantized_weight(packed, ctx.state).to(grads[0].dtype)
        bias = grads[0].flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[3] else None
        return grads[0] @ weight, None, None, bias


def dequantized_weight(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return the weights [out, in] of a 4-bit linear layer, right for every width."""
    nested = state.state2
    scales = Scales(state.absmax)
    if nested is not None:
        scales = Scales(state.absmax, nested.absmax, nested.code, state.offset)
    plain = scales.plain()
    pairs = F.pad(packed.detach().flatten(), (0, plain.numel() * BLOCK_SIZE // 2 - packed.numel()))
    blocks = dequantize(pairs, plain, state.quant_type, (plain.numel(), BLOCK_SIZE), state.dtype)
    return blocks.flatten()[: state.shape.numel()].view(state.shape)


def linear_weight(
    weights: torch.Tensor, kind: str, double: bool, module: nn.Module
) -> nn.Parameter:
    """Return `weights` [out, in] as bitsandbytes' `Linear4bit` wants them, for `module`.

    The same values as moving a `Params4bit` to a device, in slices and without a copy of the whole.
    """
    packed, state = stored_matrix(weights, kind, double)
    module.quant_state = state
    parameter: nn.Parameter = bitsandbytes().nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK_SIZE,
        compress_statistics=double,
        quant_type=kind,
        module=module,
        bnb_quantized=True,
    )
    return parameter


def stored_matrix(weights: torch.Tensor, kind: str, double: bool) -> tuple[torch.Tensor, Any]:
    """Return `weights` [out, in] as pairs [n / 2, 1] uint8 and bitsandbytes' `QuantState`."""
    functional = bitsandbytes().functional
    packed, plain = quantize(weights, kind)
    scales = Scales.doubled(plain) if double else Scales(plain)
    nested = None
    if double:
        nested = functional.QuantState(
            absmax=scales.outer, code=scales.code, blocksize=SCALE_BLOCK_SIZE, dtype=torch.float32
        )
    state = functional.QuantState(
        absmax=scales.values,
        shape=weights.shape,
        code=functional.get_4bit_type(kind, device=weights.device),
        blocksize=BLOCK_SIZE,
        quant_type=kind,
        dtype=weights.dtype,
        offset=scales.mean,
        state2=nested,
    )
    return packed.view(-1, 1), state
