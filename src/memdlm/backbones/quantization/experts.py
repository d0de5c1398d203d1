"""Experts whose stacked weights are stored in 4 bits and dequantised piece by piece.

Every projection, forward and backward, dequantises its weights, multiplies and drops them; autograd
keeps the 4-bit storage alone. A whole stack in bfloat16 can be a gibibyte (LLaDA2-mini), so it is
stored, dequantised and multiplied in pieces of some output features of all experts: unlike a piece
of some experts, such a piece needs all pairs and so no count of them on the host.

Shapes as in `memdlm.backbones.experts`; P pieces of o output features, runs of R = o * in weights,
padded to whole blocks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from memdlm.backbones.experts import Experts, grouped_linear
from memdlm.backbones.quantization import BLOCK_SIZE, COMPUTE_DTYPE, SCALE_BLOCK_SIZE
from memdlm.backbones.quantization.four_bit import Scales, dequantize, quantize

STACKS = ("gate_up_proj", "down_proj")
PIECE_BYTES = 2**28
"""Most that one dequantised piece takes."""

# Slices of this many features start where the grouped kernel wants its rows to start.
_WHOLE_FEATURES = 8


@dataclass(frozen=True)
class StackLayout:
    """How one stack [E, out, in] is stored: [P, E, R] weights, a run being [o, in] of one expert.

    Attributes:
        num_experts: E.
        out_features: Rows of one expert's matrix.
        in_features: Columns of one expert's matrix.
        num_pieces: P, a divisor of `out_features`.
        kind: "nf4" or "fp4".
        double: Whether the scales are quantised too.
        dtype: In which weights are dequantised and multiplied.
    """

    num_experts: int
    out_features: int
    in_features: int
    num_pieces: int
    kind: str
    double: bool
    dtype: torch.dtype

    @property
    def piece_features(self) -> int:
        """Output features of a piece."""
        return self.out_features // self.num_pieces

    @property
    def run(self) -> int:
        """Weights of one expert in one piece, padding included."""
        return -(-self.piece_features * self.in_features // BLOCK_SIZE) * BLOCK_SIZE

    @property
    def num_blocks(self) -> int:
        """Blocks, and so scales, of the whole stack."""
        return self.num_pieces * self.num_experts * self.run // BLOCK_SIZE

    def empty(self) -> tuple[torch.Tensor, Scales]:
        """Return uninitialised storage on the current device."""
        packed = torch.empty(self.num_pieces, self.num_experts, self.run // 2, dtype=torch.uint8)
        if not self.double:
            return packed, Scales(torch.empty(self.num_blocks))
        return packed, Scales(
            torch.empty(self.num_blocks, dtype=torch.uint8),
            torch.empty(-(-self.num_blocks // SCALE_BLOCK_SIZE)),
            torch.empty(256),
            torch.empty(()),
        )

    def pack(self, matrices: Iterable[torch.Tensor]) -> tuple[torch.Tensor, Scales]:
        """Store the experts' matrices [out, in], one at a time and in order."""
        packed = scales = torch.empty(0)
        for expert, matrix in enumerate(matrices):
            if expert == 0:
                with matrix.device:
                    packed = self.empty()[0]
                    scales = torch.empty(*packed.shape[:2], self.run // BLOCK_SIZE)
            runs = matrix.reshape(self.num_pieces, -1)
            runs = nn.functional.pad(runs, (0, self.run - runs.shape[1]))
            pairs, plain = quantize(runs, self.kind)
            packed[:, expert] = pairs.view(self.num_pieces, -1)
            scales[:, expert] = plain.view(self.num_pieces, -1)
        values = scales.flatten()
        return packed, Scales.doubled(values) if self.double else Scales(values)

    def piece(self, packed: torch.Tensor, plain: torch.Tensor, index: int) -> torch.Tensor:
        """Return the dequantised piece `index` [E, o, in]; `plain` are all plain scales."""
        shape = (self.num_experts, self.run)
        scales = plain.view(self.num_pieces, -1)[index]
        weights = dequantize(packed[index].flatten(), scales, self.kind, shape, self.dtype)
        size = self.piece_features * self.in_features
        return weights[:, :size].reshape(self.num_experts, -1, self.in_features)


def plan_pieces(num_experts: int, out_features: int, in_features: int, limit: int) -> int:
    """Return the least number of pieces that each take at most `limit` bytes in bfloat16."""
    for number in range(1, out_features // _WHOLE_FEATURES + 1):
        features = out_features // number
        if out_features % number or (number > 1 and features % _WHOLE_FEATURES):
            continue
        if num_experts * features * in_features * COMPUTE_DTYPE.itemsize <= limit:
            return number
    # Too large even so, or too small to cut.
    is_small = num_experts * out_features * in_features * COMPUTE_DTYPE.itemsize <= limit
    divisible = out_features % _WHOLE_FEATURES == 0
    return 1 if is_small or not divisible else out_features // _WHOLE_FEATURES


class QuantizedExperts(Experts):
    """`Experts` in 4 bits: `gate_up_proj` and `down_proj` hold [P, E, R / 2] uint8 pairs.

    The storage is parameters that never need a gradient, not buffers, which data-parallel training
    would send around before every forward.
    """

    def __init__(
        self,
        experts: Experts,
        kind: str = "nf4",
        double: bool = True,
        dtype: torch.dtype = COMPUTE_DTYPE,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """Allocate storage for experts shaped as `experts`, whose weights are not read.

        Args:
            experts: On any device, the meta device included.
            kind: "nf4" or "fp4".
            double: Store the scales in 8 bits too.
            dtype: In which weights are dequantised and multiplied.
            piece_bytes: Most that one dequantised piece takes in bfloat16.
        """
        sizes = (experts.num_experts, experts.hidden_size, experts.intermediate_size)
        with torch.device("meta"):
            super().__init__(*sizes, act="silu")
        self.act_fn = experts.act_fn
        self.layouts: dict[str, StackLayout] = {}
        for name in STACKS:
            count, out, width = getattr(self, name).shape
            number = plan_pieces(count, out, width, piece_bytes)
            self.layouts[name] = StackLayout(count, out, width, number, kind, double, dtype)
            packed, scales = self.layouts[name].empty()
            setattr(self, name, nn.Parameter(packed, requires_grad=False))
            self.add_module(f"{name}_scales", StoredScales(scales))

    @classmethod
    def from_experts(cls, experts: Experts, **settings: Any) -> "QuantizedExperts":
        """Quantise the weights of `experts`; `settings` as for the constructor."""
        with experts.gate_up_proj.device:
            quantized = cls(experts, **settings)
        for name in STACKS:
            for path, parameter in quantized.packed(name, getattr(experts, name).detach()).items():
                module, _, last = path.rpartition(".")
                setattr(quantized.get_submodule(module), last, parameter)
        return quantized

    @property
    def layout(self) -> StackLayout:
        """How the gate and up projections are stored; the down projection differs in sizes."""
        return self.layouts["gate_up_proj"]

    @property
    def num_weights(self) -> int:
        """Weights of all experts, however stored."""
        return 3 * self.num_experts * self.hidden_size * self.intermediate_size

    def packed(self, name: str, matrices: Iterable[torch.Tensor]) -> dict[str, nn.Parameter]:
        """Quantise the stack `name` and return its storage by parameter name, not yet set.

        Args:
            name: `gate_up_proj` or `down_proj`.
            matrices: One [out, in] per expert.
        """
        packed, scales = self.layouts[name].pack(matrices)
        return {
            name: nn.Parameter(packed, requires_grad=False),
            **{
                f"{name}_scales.{key}": parameter
                for key, parameter in StoredScales(scales).named_parameters()
            },
        }

    def dequantized(self, name: str) -> torch.Tensor:
        """Return the whole stack [E, out, in]: for checks and export, not for computing."""
        layout, plain = self.layouts[name], self._scales(name).plain()
        packed = getattr(self, name)
        return torch.cat(
            [layout.piece(packed, plain, index) for index in range(layout.num_pieces)], dim=1
        )

    def project(self, name: str, inputs: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Multiply by the stack `name`; see `Experts.project`. Returns the inputs' dtype."""
        scales = self._scales(name)
        outputs: torch.Tensor = _Projection.apply(
            inputs,
            ends,
            self.layouts[name],
            getattr(self, name),
            scales.values,
            scales.outer,
            scales.code,
            scales.mean,
        )
        return outputs

    def extra_repr(self) -> str:
        """Show the storage too."""
        return f"{super().extra_repr()}, {self.layout.kind}"

    def _scales(self, name: str) -> Scales:
        module = self.get_submodule(f"{name}_scales")
        assert isinstance(module, StoredScales)
        return Scales(module.values, module.outer, module.code, module.mean)


class StoredScales(nn.Module):
    """`Scales` as parameters without gradients, float32 for good."""

    values: torch.Tensor
    outer: torch.Tensor | None
    code: torch.Tensor | None
    mean: torch.Tensor | None

    def __init__(self, scales: Scales) -> None:
        """Hold `scales`."""
        super().__init__()
        for name in ("values", "outer", "code", "mean"):
            tensor = getattr(scales, name)
            stored = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, stored)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A model cast to bfloat16 must not round them: only the device follows.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class _Projection(torch.autograd.Function):
    """The grouped product with a stored stack; its backward dequantises again."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        ends: torch.Tensor,
        layout: StackLayout,
        packed: torch.Tensor,
        *scales: torch.Tensor,
    ) -> torch.Tensor:
        ctx.layout, ctx.dtype = layout, inputs.dtype
        ctx.save_for_backward(ends, packed, *scales)
        inputs, plain = inputs.to(layout.dtype), Scales(*scales).plain()
        # Each piece is a temporary, gone before the next is made.
        outputs = [
            grouped_linear(inputs, layout.piece(packed, plain, index), ends)
            for index in range(layout.num_pieces)
        ]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return joined.to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ends, packed, *scales = ctx.saved_tensors
        layout: StackLayout = ctx.layout
        # Contiguous: the grouped product takes no gradient that was expanded, as of a plain sum.
        grad = grads[0].to(layout.dtype).contiguous()
        plain = Scales(*scales).plain()
        total: torch.Tensor | None = None
        for index, part in enumerate(grad.split(layout.piece_features, dim=1)):
            piece = layout.piece(packed, plain, index)
            share = grouped_linear(part, piece.transpose(1, 2), ends)
            total = share if total is None else total + share
            del piece  # before the next one is made
        assert total is not None
        return total.to(ctx.dtype), *[None] * 7
