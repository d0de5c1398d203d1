"""Keep memory that is freed for the next allocation, in place of returning it to the system.

On a CPU the states of a forward are allocated and freed operation by operation. The C library
returns blocks of such sizes to the system at once, which has to clear every page again for the next
one: 9 of the 95 seconds of a quickstart (docs/log.md).
"""

import ctypes
import os
import sys

# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

# The largest block that may come from the heap: as far as the C library's own adaptation goes.
_LARGEST_BLOCK = 32 << 20
# Free memory beyond this is returned all the same.
_MOST_KEPT = 512 << 20

_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tell glibc to keep up to 512 MiB of freed memory; tell whether it will.

    Leaves other C libraries alone, and whoever has set one of glibc's environment variables.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_TRIM_THRESHOLD, _MOST_KEPT))
