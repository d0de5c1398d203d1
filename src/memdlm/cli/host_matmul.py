"""Multiply large float32 matrices with oneDNN where MKL leaves half of the CPU unused.

PyTorch multiplies float32 matrices with MKL. On AMD's processors with AVX-512 oneDNN, which PyTorch
contains as well, was measured faster: a tenth on Zen 4, twice on Zen 5 (docs/log.md). This changes
the whole process, so that commands do it and the library does not.
"""

import os
import platform
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Multiplications below which preparing oneDNN, some 15 us a product, costs more than it gains. MKL
# leaves half of Zen 5's multipliers unused; those of Zen 4, family 25, are half as wide.
_FEWEST = 1 << 21
_FEWEST_ON_ZEN4 = 1 << 24
_ZEN4 = 25

# Whoever limits oneDNN has a reason.
_OWN_SETTINGS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")

_in_force: "OneDnnProducts | None" = None


class OneDnnProducts:
    """While in force, large products of float32 matrices on a CPU are oneDNN's, of gradients too.

    Large are those of at least `fewest` multiplications.

    Products of bfloat16 are oneDNN's in any case. Batched products, those with a bias (Dream's
    queries, keys and values) and grouped ones stay as they are: the last have other shapes in every
    forward, and oneDNN prepares for each shape anew.
    """

    def __init__(self, fewest: int = _FEWEST) -> None:
        """Put oneDNN in MKL's place."""
        import torch

        self.fewest = fewest
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._mkl = torch.library.get_kernel("aten::mm", "CPU")
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced
            self._library.impl("mm", self._multiply, "CPU", with_keyset=True, allow_override=True)

    def end(self) -> None:
        """Give MKL its place back."""
        global _in_force
        self._library._destroy()
        if _in_force is self:
            _in_force = None

    def _multiply(self, keys: Any, left: "torch.Tensor", right: "torch.Tensor") -> "torch.Tensor":
        """Return `left` [M, K] times `right` [K, N]; what is refused is MKL's to refuse."""
        product: torch.Tensor = (
            self._linear(left, right.t(), None, "none", [], "")
            if self._is_large(left, right)
            else self._mkl.call_boxed(keys, left, right)
        )
        return product

    def _is_large(self, left: "torch.Tensor", right: "torch.Tensor") -> bool:
        import torch

        if left.dtype is not torch.float32 or right.dtype is not torch.float32:
            return False
        (rows, inner), (height, columns) = left.shape, right.shape
        if inner != height or rows * inner * columns < self.fewest:
            return False
        # For other strides oneDNN has plain loops only, hundreds of times slower.
        return right.is_contiguous() or right.t().is_contiguous()


def speed_up_products() -> OneDnnProducts | None:
    """Let oneDNN multiply, on a CPU where that is faster; None elsewhere. Again changes nothing.

    Elsewhere is: no AMD, no AVX-512, a PyTorch without MKL or oneDNN, and an environment that
    limits oneDNN.
    """
    import torch

    global _in_force
    if _in_force is not None or any(name in os.environ for name in _OWN_SETTINGS):
        return _in_force
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    family = _amd_family()
    if has_both and torch.backends.cpu.get_cpu_capability() == "AVX512" and family is not None:
        _in_force = OneDnnProducts(_FEWEST_ON_ZEN4 if family <= _ZEN4 else _FEWEST)
    return _in_force


def _amd_family() -> int | None:
    """Return the family of an AMD processor, 25 for Zen 3 and 4; None for another maker's."""
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # no Linux
        processor = platform.processor()  # "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD"
    found = re.search(r"family[\s:]+(\d+)", processor, flags=re.IGNORECASE)
    return int(found[1]) if found and "AuthenticAMD" in processor else None
