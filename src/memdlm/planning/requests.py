"""FLOPs of answering one request: writing a memory from its prompt, then the denoising steps.

The code that runs is the code that answers, on tensors that have a shape and a type but no data
(see `memdlm.planning.simulation`): the inner loop as it is, one forward for all denoising steps of
a whole canvas, one for all steps on a block beside cached keys. Only the number of steps is
reckoned: one slot a step, the most there can be; a confidence threshold makes it less.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memdlm.backbones.wrapping import unwrap
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import plan_inner_loop, run_inner_loop
from memdlm.memory.placement import place
from memdlm.memory.prompt import Round, prompt_trajectory
from memdlm.planning.flops import operation_flops
from memdlm.planning.grouped import grouped_mm_result
from memdlm.planning.simulation import give_shapes, without_data
from memdlm.sampling.cached_forward import CachedForward
from memdlm.seeding import generator, preserved_rng


@dataclass(frozen=True)
class RequestFlops:
    """Matrix products of one request.

    Attributes:
        write: Writing the memory; 0 without.
        prefill: Reading the prompt into a cache; 0 without a cache.
        step: One denoising step.
        num_steps: Denoising steps, at most.
    """

    write: int
    prefill: int
    step: int
    num_steps: int

    @property
    def total(self) -> int:
        """Sum over the request."""
        return self.write + self.prefill + self.num_steps * self.step


class RequestCounter:
    """Counts requests on one model; equal ones once."""

    def __init__(self, model: nn.Module) -> None:
        """Take `model` from the meta device, adapter included; it is used up."""
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            give_shapes(model)
        model.eval()
        self._model, self._backbone = model, unwrap(model)
        self._known: dict[Any, int] = {}

    def count(
        self,
        prompt_length: int,
        new_tokens: int,
        memory: MemoryConfig | None = None,
        *,
        block_length: int | None = None,
        objective: ObjectiveConfig | None = None,
    ) -> RequestFlops:
        """Return the FLOPs of answering a prompt of `prompt_length` tokens with `new_tokens`.

        Args:
            prompt_length: Tokens of the prompt, at least 1.
            new_tokens: Slots of the answer.
            memory: Settings of the memory written from the prompt; None or off for none.
            block_length: Slots of a block beside an exact cache; None for steps over the whole
                canvas.
            objective: Noise schedule of the memory's anchor.
        """
        fast = None if memory is None or not memory.enabled else memory
        objective = objective or ObjectiveConfig()
        write = 0 if fast is None else self._write(prompt_length, fast, objective)
        placed = _placing(fast)
        if block_length is None:
            step = self._forward(prompt_length + new_tokens, new_tokens, placed)
            return RequestFlops(write, 0, step, new_tokens)
        prefill = self._cached(prompt_length, prompt_length, placed)
        canvas = prompt_length + new_tokens
        step = self._cached(min(block_length, canvas), canvas, placed)
        return RequestFlops(write, prefill, step, new_tokens)

    def _forward(self, length: int, num_slots: int, placed: MemoryConfig | None) -> int:
        """Count a forward of a whole canvas [1, length] with logits at its last slots."""

        def run() -> None:
            slots = torch.arange(length - num_slots, length)[None]
            self._model(torch.zeros(1, length, dtype=torch.int64), positions=slots)

        return self._counted(("forward", length, num_slots, placed), run, placed)

    def _cached(self, num_columns: int, num_visible: int, placed: MemoryConfig | None) -> int:
        """Count a forward of some columns that attend to `num_visible` cached ones."""

        def run() -> None:
            start = num_visible - num_columns
            forward = CachedForward(self._model, num_visible)
            tokens = torch.zeros(1, num_visible, dtype=torch.int64)
            positions = torch.arange(start, num_visible)[None][:, -1:]
            forward(tokens, [(start, num_visible)], positions, num_visible, lambda *_: None)

        return self._counted(("cached", num_columns, num_visible, placed), run, placed)

    def _write(self, length: int, memory: MemoryConfig, objective: ObjectiveConfig) -> int:
        """Count the inner loop on a prompt [1, length], which fits the context."""
        config = replace(memory, sharing="sequence", weighting=memory.prompt_weighting)
        chunk = Round((0,), torch.zeros(1, length, dtype=torch.int64), None)
        trajectory, batch = prompt_trajectory(chunk, [0], [0], config, objective, 0)
        plan = without_data(plan_inner_loop(trajectory, batch, config, objective), self._mode)

        def run() -> None:
            with torch.no_grad():
                _, inputs = self._backbone.model.embed(plan.states[0])
            run_inner_loop(self._backbone, self._fast(config), plan, config, inputs)

        return self._counted(("write", length, config, objective), run, None)

    def _fast(self, config: MemoryConfig) -> FastWeights:
        placement = place(self._backbone.model, config)
        return FastWeights(placement, config, 1, torch.device("cpu"), [generator(0, "fast")])

    def _counted(self, key: Any, run: Any, placed: MemoryConfig | None) -> int:
        if key not in self._known:
            with preserved_rng(torch.device("cpu")), self._mode:
                if placed is None:
                    with _Count() as count:
                        run()
                else:
                    fast = self._fast(placed)
                    with torch.no_grad(), fast.attached(self._backbone.model), _Count() as count:
                        run()
            self._known[key] = count.flops
        return self._known[key]


def _placing(memory: MemoryConfig | None) -> MemoryConfig | None:
    """Return what a forward with a memory depends on: its place and shape, not its writing."""
    if memory is None:
        return None
    return MemoryConfig(
        kind=memory.kind,
        rank=memory.rank,
        scope=memory.scope,
        modules=memory.modules,
        layer_fraction=memory.layer_fraction,
    )


class _Count(TorchDispatchMode):
    """Sums the FLOPs of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            out = grouped_mm_result(*args[:3])
        else:
            out = func(*args, **(kwargs or {}))
        self.flops += operation_flops(func, args, kwargs or {}, out)
        return out
