"""How many bytes a memory takes while it is written, and how many memories fit a budget."""

import math

from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import tensor_shapes
from memdlm.memory.placement import Placement

# While it is written: the fast weights, their gradients, and the next fast weights while the step
# is taken (memdlm.memory.update). Activations are not counted: they are the model's.
COPIES_WHILE_WRITING = 3
_BYTES_PER_VALUE = 4  # float32, whatever the model's dtype


def memory_bytes(placement: Placement, config: MemoryConfig) -> int:
    """Return the bytes of one memory's fast weights."""
    return _BYTES_PER_VALUE * sum(
        math.prod(shape)
        for site in placement.sites
        for shape in tensor_shapes(site, config).values()
    )


def rows_within(max_bytes: int, row_bytes: int) -> int:
    """Return how many memories of `row_bytes` each fit into `max_bytes`.

    Raises:
        ConfigError: Not even one does.
    """
    if max_bytes < row_bytes:
        raise ConfigError(
            f"max_memory_bytes: one memory needs {row_bytes:,} bytes, more than the "
            f"{max_bytes:,} allowed; allow more, or lower memory.rank or memory.layer_fraction"
        )
    return max_bytes // row_bytes
