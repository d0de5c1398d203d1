"""Writing a memory costs at most 2.3 forward passes of its prompt, counted in FLOPs."""

import pytest

from benchmarks.speed.memory_write import MODELS, MOST_FORWARDS, build, write_cost
from memdlm.memory.config import MemoryConfig


@pytest.mark.parametrize("name", MODELS)
def test_a_write_costs_little_more_than_two_forward_passes(name) -> None:
    model = build(name)
    flops = write_cost(model, 2048, MemoryConfig())
    # Two inner steps run every layer: below that something was not counted, or not run.
    assert 1.5 < flops["write"] / flops["forward"] <= MOST_FORWARDS
