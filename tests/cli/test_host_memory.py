"""Freed memory is kept: counted in page faults, in processes of their own."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

# Buffers of a size and number as a forward has them, freed before the next ones are made.
PROGRAM = """
import resource, sys
from memdlm.cli.host_memory import keep_freed_memory

print(keep_freed_memory() if sys.argv[1] == "keep" else "-")
for turn in range(20):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [bytearray(2 << 20) for _ in range(8)]
    del buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 18 * 8 * (2 << 20) // 4096

is_glibc = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def run(mode: str, **environment: str) -> tuple[str, int]:
    """Return what `keep_freed_memory` said, and the page faults of 18 rounds."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        env={**kept, "PYTHONPATH": str(SOURCE), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    said, faults = done.stdout.split()
    return said, int(faults)


@pytest.mark.skipif(not is_glibc, reason="speaks to glibc")
def test_buffers_are_not_returned_to_the_system_and_cleared_again() -> None:
    said, faults = run("keep")
    assert said == "True"
    assert faults < PAGES / 100
    assert run("leave")[1] > PAGES / 2


def test_whoever_has_set_the_allocator_is_left_alone() -> None:
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
