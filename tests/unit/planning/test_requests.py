"""A request's FLOPs are those that the code which answers it really takes."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memdlm.backbones.tiny import TINY_FAMILIES
from memdlm.errors import UsageError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.planning.flops import operation_flops
from memdlm.planning.gpus import GPUS, SPEEDS, GpuSpeed, find_speed
from memdlm.planning.requests import RequestCounter
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode

from .conftest import VOCABULARY, build

PROMPT, NEW = 40, 6
MEMORY = MemoryConfig(rank=4, layer_fraction=0.5)


class Counted(TorchDispatchMode):
    """FLOPs of operations on real tensors."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += operation_flops(func, args, kwargs or {}, out)
        return out


def prompt() -> torch.Tensor:
    return torch.randint(VOCABULARY - 2, (PROMPT,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("memory", [None, MEMORY], ids=["plain", "memory"])
def test_a_request_on_a_whole_canvas_is_counted_to_the_flop(family, memory) -> None:
    model, _ = build(family, "cpu", is_lora=True)
    model.eval()
    sampling = SamplingConfig(max_new_tokens=NEW, decoder="masked", stop_at_eos=False)
    with Counted() as count:
        if memory is None:
            decode(model, [prompt()], sampling)
        else:
            written = ParametricMemory(model, memory)
            written.write(prompt()[None])
            with written.attached():
                decode(model, [prompt()], sampling)

    expected = RequestCounter(build(family, "meta", is_lora=True)[0]).count(PROMPT, NEW, memory)
    assert expected.num_steps == NEW
    # Which tokens an anchor masks is drawn, and with them the size of the head's product.
    tolerance = 0 if memory is None else 0.02
    assert expected.total == pytest.approx(count.flops, rel=tolerance)
    assert (expected.write > 0) == (memory is not None)


def test_a_block_beside_cached_keys_costs_a_small_part_of_a_whole_forward() -> None:
    counter = RequestCounter(build("llada2", "meta")[0])
    whole = counter.count(128, 32)
    cached = counter.count(128, 32, block_length=32)
    assert cached.prefill > 0
    assert cached.step < 0.4 * whole.step
    assert cached.total < whole.total


def test_longer_prompts_and_wider_memories_cost_more() -> None:
    counter = RequestCounter(build("llada_moe", "meta")[0])
    short, long = counter.count(40, 4, MEMORY), counter.count(80, 4, MEMORY)
    assert long.write > 1.5 * short.write
    assert long.step > 1.5 * short.step
    wide = counter.count(40, 4, MemoryConfig(rank=4, layer_fraction=1.0))
    assert wide.write > short.write


def test_every_gpu_whose_speed_is_known_has_a_memory_and_others_are_refused() -> None:
    assert find_speed("H200") == GpuSpeed(989e12, 4.8e12)
    with pytest.raises(UsageError, match="rtx3060"):
        find_speed("rtx3060")
    assert set(SPEEDS) <= set(GPUS)
