"""The few calls of bitsandbytes that store weights in 4 bits; imports it when first needed.

Weights are flat runs in blocks of `BLOCK_SIZE` that share one scale; scales may be stored in 8 bits
around their mean, in blocks of `SCALE_BLOCK_SIZE`.
"""

from dataclasses import dataclass
from types import ModuleType

import torch

from memdlm.backbones.quantization import BLOCK_SIZE, SCALE_BLOCK_SIZE
from memdlm.errors import ConfigError

# bitsandbytes' CPU code takes some 20 bytes of scratch per weight, so this many weights at a time.
_SLICE = 2**22


def bitsandbytes() -> ModuleType:
    """Import bitsandbytes.

    Raises:
        ConfigError: It is not installed, or cannot be imported.
    """
    try:
        import bitsandbytes as library
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"quantization: 4-bit weights need bitsandbytes ({' '.join(str(error).split())}): "
            "pip install 'memdlm[quant]', or set quantization.kind: none"
        ) from error
    return library


@dataclass(frozen=True)
class Scales:
    """One scale per block of weights.

    Attributes:
        values: [n] float32, or uint8 if they are quantised in turn.
        outer: Scales of the scales [n / SCALE_BLOCK_SIZE] float32; None for plain ones.
        code: What the 8-bit values stand for [256] float32; None for plain ones.
        mean: Added to every scale, a float32 scalar; None for plain ones.
    """

    values: torch.Tensor
    outer: torch.Tensor | None = None
    code: torch.Tensor | None = None
    mean: torch.Tensor | None = None

    @classmethod
    def doubled(cls, values: torch.Tensor) -> "Scales":
        """Quantise plain scales [n]."""
        mean = values.mean()
        stored, state = bitsandbytes().functional.quantize_blockwise(
            values - mean, blocksize=SCALE_BLOCK_SIZE
        )
        return cls(stored, state.absmax, state.code, mean)

    def plain(self) -> torch.Tensor:
        """Return the scales [n] float32."""
        if self.outer is None or self.mean is None:
            return self.values
        functional = bitsandbytes().functional
        scales: torch.Tensor = functional.dequantize_blockwise(
            self.values, absmax=self.outer, code=self.code, blocksize=SCALE_BLOCK_SIZE
        )
        return scales + self.mean


def quantize(weights: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Store weights in 4 bits.

    Args:
        weights: [...], n elements, float32, bfloat16 or float16.
        kind: "nf4" or "fp4".

    Returns:
        Pairs of weights [n / 2] uint8 and plain scales [n / BLOCK_SIZE] float32, both rounded up.
    """
    functional = bitsandbytes().functional
    flat = weights.reshape(-1)
    # What stays is allocated before what goes, or it would keep the freed scratch from the system.
    packed = flat.new_empty(-(-flat.numel() // 2), dtype=torch.uint8)
    scales = flat.new_empty(-(-flat.numel() // BLOCK_SIZE), dtype=torch.float32)
    for start in range(0, flat.numel(), _SLICE):
        piece = flat[start : start + _SLICE]
        pairs, state = functional.quantize_4bit(piece, blocksize=BLOCK_SIZE, quant_type=kind)
        packed[start // 2 :][: pairs.numel()] = pairs.view(-1)
        scales[start // BLOCK_SIZE :][: state.absmax.numel()] = state.absmax
    return packed, scales


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the weights [*shape] of pairs [n / 2] and plain scales; see `quantize`.

    The last dimension must be a multiple of `BLOCK_SIZE`: of other shapes bitsandbytes' CPU kernel
    (0.50) gives wrong numbers.
    """
    assert shape[-1] % BLOCK_SIZE == 0
    functional = bitsandbytes().functional
    state = functional.QuantState(
        absmax=scales, shape=shape, dtype=dtype, blocksize=BLOCK_SIZE, quant_type=kind
    )
    weights: torch.Tensor = functional.dequantize_4bit(packed.view(-1, 1), state)
    return weights
