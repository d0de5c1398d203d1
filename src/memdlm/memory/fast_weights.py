"""Fast weights phi: transient deltas beside a frozen base, outside the module tree (MemDLM Eq. 9).

    lora:  y = W x + (alpha / rank) B A x     A ~ U(+-1/sqrt(in)), B = 0
    full:  y = W x + D x                      D = 0

One shape serves one memory or many: A is [b, r, in], B [b, out, r], D [b, out, in], with b = 1
(shared by the batch) or b = rows (one memory per sequence); for experts a dimension E follows b.
Tensors are float32 whatever the model's dtype and are cast where they meet activations. They live
in this object and are attached by forward hooks and by `Experts.attach`, so that state dicts,
checkpoints, PEFT, DDP and FSDP2 see an ordinary model (docs/decisions/0004).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from memdlm.backbones.base import DiffusionModel
from memdlm.backbones.batch_rows import present_rows
from memdlm.backbones.experts import Experts, grouped_linear
from memdlm.memory.config import MemoryConfig
from memdlm.memory.placement import Placement, Site

PARTS = ("A", "B", "delta")


class FastWeights:
    """The tensors of one memory (or of one per row), and how they enter a forward.

    Attributes:
        placement: Where they apply.
        tensors: Name -> float32 tensor, e.g. `layers.15.mlp.up_proj.A`; replaced by every inner
            step, read at every forward while attached.
        num_rows: b, the number of memories.
        scale: alpha / rank, or 1 for full deltas.
    """

    def __init__(
        self,
        placement: Placement,
        config: MemoryConfig,
        num_rows: int,
        device: torch.device,
        generator: torch.Generator | Sequence[torch.Generator],
    ) -> None:
        """Create phi_0, which has no effect on any output.

        Args:
            placement: From `memdlm.memory.placement.place`.
            config: `kind`, `rank` and `alpha`.
            num_rows: 1, or the batch size for one memory per sequence.
            device: Where the tensors live.
            generator: On `device`; one for all rows, which then start from the same A, or one per
                row. Either way a row's memory does not depend on what else is in its batch.
        """
        self.placement = placement
        self.num_rows = num_rows
        self.scale = config.scale
        self.tensors: dict[str, torch.Tensor] = {}
        generators = list(generator) if isinstance(generator, Sequence) else [generator] * num_rows
        for site in placement.sites:
            for name, shape in tensor_shapes(site, config).items():
                if name != "A":
                    rows = [torch.zeros(shape, device=device)] * num_rows
                else:
                    bound = 1 / math.sqrt(site.in_features)
                    drawn = {
                        draws: torch.empty(shape, device=device).uniform_(
                            -bound, bound, generator=draws
                        )
                        for draws in dict.fromkeys(generators)
                    }
                    rows = [drawn[draws] for draws in generators]
                self.tensors[f"{site.name}.{name}"] = stack_rows(rows, site)

    @classmethod
    def of(
        cls, placement: Placement, scale: float, tensors: Mapping[str, torch.Tensor]
    ) -> "FastWeights":
        """Wrap tensors [b, ...] that exist already; every site's must be there."""
        fast = cls.__new__(cls)
        fast.placement, fast.scale = placement, scale
        fast.tensors = dict(tensors)
        fast.num_rows = next(iter(fast.tensors.values())).shape[0]
        return fast

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def names(self, site: Site) -> list[str]:
        """Return the names of the tensors at `site`."""
        names = [f"{site.name}.{part}" for part in PARTS]
        return [name for name in names if name in self.tensors]

    @contextmanager
    def attached(self, model: DiffusionModel) -> Iterator[None]:
        """Add the deltas to every forward of `model` within the block."""
        handle = self.attach(model)
        try:
            yield
        finally:
            handle()

    def attach(self, model: DiffusionModel) -> Callable[[], None]:
        """Add the deltas to every forward of `model` until the returned function is called.

        They must stay attached and unchanged until a backward pass through the forward has ended:
        gradient checkpointing runs the layers again.
        """
        handles: list[RemovableHandle] = []
        stacks: dict[str, dict[str, _ExpertDelta]] = defaultdict(dict)
        for site in self.placement.sites:
            if site.projection is None:
                hook = _LinearDelta(self, site)
                handles.append(model.get_submodule(site.module).register_forward_hook(hook))
            else:
                stacks[site.module][site.projection] = _ExpertDelta(self, site)
        experts = {path: _experts(model, path) for path in stacks}
        for path, stack in experts.items():
            stack.attach(stacks[path])

        def detach() -> None:
            for handle in handles:
                handle.remove()
            for stack in experts.values():
                stack.attach({})

        return detach

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace tensors by name; shapes [b, ...] must agree.

        Raises:
            ValueError: For an unknown name or another shape.
        """
        for name, tensor in tensors.items():
            if name not in self.tensors or tensor.shape != self.tensors[name].shape:
                known = tuple(self.tensors[name].shape) if name in self.tensors else "no such name"
                raise ValueError(f"fast weight {name}: got {tuple(tensor.shape)}, expected {known}")
            self.tensors[name] = tensor.to(self.tensors[name])

    def select(self, rows: Sequence[int]) -> "FastWeights":
        """Return a copy of some memories, in the order of `rows`."""
        tensors = {}
        for site in self.placement.sites:
            for name in self.names(site):
                chosen = [self.tensors[name][row] for row in rows]
                tensors[name] = stack_rows(chosen, site)
        return FastWeights.of(self.placement, self.scale, tensors)

    def put(self, rows: Sequence[int], other: "FastWeights") -> None:
        """Replace the memories `rows` by those of `other`, in order."""
        for name, tensor in self.tensors.items():
            for index, row in enumerate(rows):
                tensor[row] = other.tensors[name][index]

    def drop(self, alive: torch.Tensor) -> None:
        """Take back the effect of every memory that is not `alive` [b] bool.

        Zeroing the second factor suffices, and keeps every shape and name.
        """
        for name, tensor in self.tensors.items():
            if not name.endswith(".A"):
                keep = alive.view(-1, *[1] * (tensor.dim() - 1))
                self.tensors[name] = torch.where(keep, tensor, 0.0)

    def delta_norm(self) -> torch.Tensor:
        """Return the norm of all second factors (B, or the full deltas) per memory [b]."""
        squares = [
            tensor.flatten(1).square().sum(dim=1)
            for name, tensor in self.tensors.items()
            if not name.endswith(".A")
        ]
        return torch.stack(squares).sum(dim=0).sqrt()


def tensor_shapes(site: Site, config: MemoryConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that one memory has at `site`."""
    if config.kind == "full":
        return {"delta": (*site.lead, site.out_features, site.in_features)}
    return {
        "A": (*site.lead, config.rank, site.in_features),
        "B": (*site.lead, site.out_features, config.rank),
    }


def stack_rows(rows: Sequence[torch.Tensor], site: Site) -> torch.Tensor:
    """Return the tensors of several memories at one site as one [b, ...]."""
    if site.num_experts is None:
        return torch.stack(list(rows))
    # Experts first in memory, rows first in the shape: the grouped product wants (expert, row)
    # groups side by side and then needs no copy, since elementwise updates keep the strides.
    return torch.stack(list(rows), dim=1).transpose(0, 1)


def _experts(model: DiffusionModel, path: str) -> Experts:
    module = model.get_submodule(path)
    assert isinstance(module, Experts)
    return module


class _LinearDelta:
    """Forward hook of a linear layer."""

    def __init__(self, fast: FastWeights, site: Site) -> None:
        self.fast, self.site = fast, site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        inputs: torch.Tensor = args[0]
        present = None if self.fast.num_rows == 1 else present_rows()
        num_rows = self.fast.num_rows if present is None else len(present)
        delta = inputs.reshape(num_rows, -1, inputs.shape[-1])  # [b, tokens, in]
        for name in self.fast.names(self.site):  # A, then B, or the full delta
            matrices = self.fast.tensors[name]
            if present is not None:
                matrices = matrices[present]
            delta = delta @ matrices.to(inputs.dtype).transpose(1, 2)
        return output + self.fast.scale * delta.view_as(output).to(output.dtype)


class _ExpertDelta:
    """One projection of a stack of experts; see `memdlm.backbones.experts.ExpertDelta`."""

    def __init__(self, fast: FastWeights, site: Site) -> None:
        self.fast, self.site = fast, site
        self.num_rows = fast.num_rows

    def __call__(self, inputs: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        if f"{self.site.name}.delta" in self.fast.tensors:
            return grouped_linear(inputs, self._groups("delta", inputs.dtype), offsets)
        low = grouped_linear(inputs, self._groups("A", inputs.dtype), offsets)  # [S, r]
        return self.fast.scale * grouped_linear(low, self._groups("B", inputs.dtype), offsets)

    def _groups(self, factor: str, dtype: torch.dtype) -> torch.Tensor:
        """Return [b, E, ...] as [E * b, ...]."""
        tensor = self.fast.tensors[f"{self.site.name}.{factor}"]
        return tensor.transpose(0, 1).flatten(0, 1).to(dtype)
