"""Memory and speed of common GPUs, and what of the memory a plan leaves for what is no tensor."""

from dataclasses import dataclass

from memdlm.errors import UsageError

GIB = 2**30

# GiB of memory on one card, from the makers' data sheets.
GPUS = {
    "t4": 16,
    "v100-16gb": 16,
    "v100-32gb": 32,
    "rtx3060": 12,
    "rtx3090": 24,
    "rtx4080": 16,
    "rtx4090": 24,
    "rtx5090": 32,
    "a10": 24,
    "a10g": 24,
    "l4": 24,
    "a40": 48,
    "a6000": 48,
    "rtx6000-ada": 48,
    "l40s": 48,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
}
# Peak of dense products in 16 bits with float32 sums, in 10^12 FLOPs a second, from the makers'
# data sheets: without sparsity, and of the SXM card where there is a choice.
PEAK_TFLOPS = {
    "t4": 65,
    "v100-16gb": 125,
    "v100-32gb": 125,
    "rtx3090": 71,
    "rtx4080": 97,
    "rtx4090": 165,
    "rtx5090": 210,
    "a10": 125,
    "l4": 121,
    "a40": 150,
    "a6000": 155,
    "rtx6000-ada": 364,
    "l40s": 362,
    "a100-40gb": 312,
    "a100-80gb": 312,
    "h100": 989,
    "h200": 989,
    "b200": 2250,
}
# Makers' gigabytes above 100 are decimal: an H200 has 141e9 bytes, a B200 180e9.
_DECIMAL_FROM = 100

CONTEXT_BYTES = GIB
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Gpu:
    """A GPU by name and its memory in bytes."""

    name: str
    memory: int

    def margin(self, peak: int) -> int:
        """Return the bytes left (negative: missing) when tensors take `peak` bytes."""
        return self.memory - peak - reserve(peak)


def reserve(peak: int) -> int:
    """Return what to keep beside `peak` bytes of tensors: CUDA context and fragmentation.

    1 GiB for the context, the libraries' workspaces and scratch inside kernels, and 5 % for gaps
    between blocks of the caching allocator. An assumption, not a measurement.
    """
    return CONTEXT_BYTES + round(FRAGMENTATION * peak)


def peak_flops(name: str) -> float:
    """Return the peak of a GPU in FLOPs a second.

    Raises:
        UsageError: It is not in the table.
    """
    key = name.strip().lower()
    if key not in PEAK_TFLOPS:
        raise UsageError(
            f"--gpu: the speed of {name!r} is not known; known are {', '.join(PEAK_TFLOPS)}"
        )
    return PEAK_TFLOPS[key] * 1e12


def find_gpu(text: str) -> Gpu:
    """Return the GPU called `text`, or one with that many GiB.

    Raises:
        UsageError: Neither a known name nor a positive number.
    """
    name = text.strip().lower()
    if name in GPUS:
        size = GPUS[name]
        return Gpu(name, round(size * (1e9 if size > _DECIMAL_FROM else GIB)))
    try:
        size_gib = float(name.removesuffix("gib").removesuffix("gb"))
    except ValueError:
        size_gib = 0.0
    if not 0 < size_gib < 1e6:
        raise UsageError(f"--gpu: {text!r} is neither a number of GiB nor one of {', '.join(GPUS)}")
    return Gpu(f"{size_gib:g} GiB", round(size_gib * GIB))
