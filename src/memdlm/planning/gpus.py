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
# From the makers' data sheets, of the SXM card where there is a choice: peak of dense products in
# 16 bits with float32 sums, without sparsity, in 10^12 FLOPs a second; and of reading memory, in
# 10^9 bytes a second.
SPEEDS = {
    "t4": (65, 320),
    "v100-16gb": (125, 900),
    "v100-32gb": (125, 900),
    "rtx3090": (71, 936),
    "rtx4080": (97, 717),
    "rtx4090": (165, 1008),
    "rtx5090": (210, 1792),
    "a10": (125, 600),
    "l4": (121, 300),
    "a40": (150, 696),
    "a6000": (155, 768),
    "rtx6000-ada": (364, 960),
    "l40s": (362, 864),
    "a100-40gb": (312, 1555),
    "a100-80gb": (312, 2039),
    "h100": (989, 3350),
    "h200": (989, 4800),
    "b200": (2250, 8000),
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


@dataclass(frozen=True)
class GpuSpeed:
    """What a GPU does at best: FLOPs and bytes of memory a second."""

    flops: float
    bytes: float


def find_speed(name: str) -> GpuSpeed:
    """Return the speed of a GPU.

    Raises:
        UsageError: It is not in the table.
    """
    key = name.strip().lower()
    if key not in SPEEDS:
        raise UsageError(
            f"--gpu: the speed of {name!r} is not known; known are {', '.join(SPEEDS)}"
        )
    tera_flops, giga_bytes = SPEEDS[key]
    return GpuSpeed(tera_flops * 1e12, giga_bytes * 1e9)


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
