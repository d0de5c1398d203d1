"""Named random streams, all derived from one seed, none with state to checkpoint.

A generator is a pure function of (seed, stream name, indices), so two runs that differ in one
component still share every other draw (memory on and off see the same masks), and a resumed run
continues exactly without saving a generator: step 1000 draws what step 1000 draws.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, stream: str, *indices: int) -> int:
    """Return a 63-bit seed that depends on all arguments and on nothing else.

    Args:
        seed: The run's one seed.
        stream: What is being drawn, e.g. `"outer_mask"`, `"trajectory"`, `"fast_weights"`.
        indices: Position in the stream, e.g. optimizer step, micro-batch, process rank.
    """
    text = "/".join([str(seed), stream, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(
    seed: int, stream: str, *indices: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a fresh generator for one position of one named stream (see `derive_seed`)."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, stream, *indices))


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Restore the global CPU (and, for an accelerator, device) random state on exit."""
    if device.type in ("cpu", "meta"):
        context = torch.random.fork_rng(devices=[])
    else:
        context = torch.random.fork_rng(devices=[device], device_type=device.type)
    with context:
        yield
