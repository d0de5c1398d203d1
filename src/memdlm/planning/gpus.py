"""Memory of common GPUs, and what of it a plan leaves for everything that is no tensor."""

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
