"""What the benchmark of the experts runs: one layer with an outer LoRA and fast weights, two ways.

`grouped` is the library. `loop` is the plain way: for each row, for each expert, pick its tokens,
multiply, add the deltas, put the results back; every expert and row has factors that are tensors of
their own, as separate linear layers would. Base weights are frozen in both. Shapes: B rows, L
tokens a row, K experts a token, E experts, H width, I inner width, r rank.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from memdlm.backbones.experts import Experts
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.placement import Placement, Site

ROUTINGS = ("uneven", "even")
PARTS = ("memory", "LoRA + memory")
RANK, ALPHA = 32, 64


@dataclass(frozen=True)
class Shape:
    """One layer of experts and the batch it sees."""

    num_experts: int = field(default=8, metadata={"help": "Experts of the layer."})
    top_k: int = field(default=2, metadata={"help": "Experts that a token visits."})
    rows: int = field(default=4, metadata={"help": "Sequences, each with a memory of its own."})
    length: int = field(default=256, metadata={"help": "Tokens per sequence."})
    width: int = field(default=256, metadata={"help": "Width of the hidden states."})
    inner: int = field(default=128, metadata={"help": "Inner width of an expert."})
    routing: str = field(
        default="uneven",
        metadata={"help": "uneven: expert i is chosen like 1 / i, the last one never; or even."},
    )

    def title(self) -> str:
        """Return the shape in a few words."""
        return (
            f"{self.num_experts} experts, top {self.top_k}, {self.routing}; "
            f"{self.rows} x {self.length} tokens; {self.width} x {self.inner}"
        )


class ExpertLayer:
    """Experts, their deltas and inputs, with a forward and backward of each variant."""

    def __init__(self, shape: Shape, parts: str, device: torch.device, dtype: torch.dtype) -> None:
        """Draw everything from one seed; `parts` is one of `PARTS`."""
        self.shape = shape
        draws = torch.Generator().manual_seed(0)

        def draw(*sizes: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(sizes, generator=draws).mul_(scale).to(device, dtype)

        sizes = (shape.num_experts, shape.width, shape.inner)
        self.experts = Experts(*sizes, "silu").to(device, dtype).requires_grad_(False)
        for weight in self.experts.parameters():
            weight.copy_(draw(*weight.shape, scale=weight.shape[-1] ** -0.5))
        self.lora = _with_lora(self.experts, draws) if parts == "LoRA + memory" else None
        self.model: Any = _Holder(self.experts if self.lora is None else self.lora)
        self.fast = _fast_weights(self.experts, shape, self.lora is not None, device, draws)
        self.chosen = choose(shape, draws).to(device)
        self.hidden = draw(shape.rows, shape.length, shape.width).requires_grad_()
        self.weights = draw(shape.rows, shape.length, shape.top_k).softmax(dim=-1).requires_grad_()
        self.towards = draw(shape.rows, shape.length, shape.width)
        self.stacked = self._stacked()
        # For the loop: one tensor of its own for each expert, and for each row and expert.
        self.single = {
            name: [matrix.detach().clone().requires_grad_() for matrix in tensor.flatten(0, -3)]
            for name, tensor in self.stacked.items()
        }

    def load(self) -> dict[str, float]:
        """Return the share of all pairs at the busiest expert, and how many experts have none."""
        counts = self.chosen.flatten().bincount(minlength=self.shape.num_experts)
        return {
            "largest_share": float(counts.max() / counts.sum()),
            "num_idle": int((counts == 0).sum()),
        }

    def run(self, variant: str) -> tuple[torch.Tensor | None, ...]:
        """Run forward and backward; return the output and the gradients of all leaves."""
        outputs = self._grouped() if variant == "grouped" else self._loop()
        loss = (outputs * self.towards).sum()
        leaves = self._leaves(variant)
        return outputs.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)

    def named(self, variant: str) -> dict[str, torch.Tensor]:
        """Run and return output and gradients by name, stacked for both variants alike."""
        outputs, hidden, weights, *grads = self.run(variant)
        assert outputs is not None and hidden is not None and weights is not None
        results = {"output": outputs, "hidden": hidden, "weights": weights}
        remaining = iter(grads)
        for name, tensor in self.stacked.items():
            if variant == "grouped":
                grad = next(remaining)
                results[name] = torch.zeros_like(tensor) if grad is None else grad
            else:
                parts = list(itertools.islice(remaining, len(self.single[name])))
                blank = torch.zeros_like(tensor[(0,) * (tensor.dim() - 2)])
                filled = [blank if part is None else part for part in parts]
                results[name] = torch.stack(filled).view_as(tensor)
        return results

    def _stacked(self) -> dict[str, torch.Tensor]:
        """Return every factor, [E, ...] of the adapter and [B, E, ...] of the memory, by name."""
        found = dict(self.fast.tensors)
        if self.lora is not None:
            for name in self.experts.projections:
                found[f"lora.{name}.A"] = self.lora.lora_A["default"][name]
                found[f"lora.{name}.B"] = self.lora.lora_B["default"][name]
        return found

    def _leaves(self, variant: str) -> list[torch.Tensor]:
        if variant == "grouped":
            return [self.hidden, self.weights, *self.stacked.values()]
        return [self.hidden, self.weights, *itertools.chain(*self.single.values())]

    def _grouped(self) -> torch.Tensor:
        layer = self.experts if self.lora is None else self.lora
        with self.fast.attached(self.model):
            outputs: torch.Tensor = layer(
                self.hidden.flatten(0, 1), self.chosen.flatten(0, 1), self.weights.flatten(0, 1)
            )
        return outputs.view_as(self.hidden)

    def _loop(self) -> torch.Tensor:
        half, rows = self.experts.intermediate_size, []
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
        inputs = zip(self.hidden, self.weights, self.chosen, strict=True)
        for row, (hidden, weights, chosen) in enumerate(inputs):
            outputs = torch.zeros_like(hidden)
            for expert in range(self.shape.num_experts):
                token, slot = (chosen == expert).nonzero(as_tuple=True)
                if len(token) == 0:
                    continue
                x = hidden[token]
                gate = self._project(x, gate_up[expert, :half], "gate_proj", row, expert)
                up = self._project(x, gate_up[expert, half:], "up_proj", row, expert)
                y = self._project(F.silu(gate) * up, down[expert], "down_proj", row, expert)
                outputs = outputs.index_add_(0, token, y * weights[token, slot, None])
            rows.append(outputs)
        return torch.stack(rows)

    def _project(
        self, x: torch.Tensor, weight: torch.Tensor, name: str, row: int, expert: int
    ) -> torch.Tensor:
        y = x @ weight.T
        if self.lora is not None:
            first, second = (self.single[f"lora.{name}.{factor}"][expert] for factor in "AB")
            y = y + ALPHA / RANK * (x @ first.to(x.dtype).T) @ second.to(x.dtype).T
        index = row * self.shape.num_experts + expert
        first, second = (self.single[f"experts.{name}.{factor}"][index] for factor in "AB")
        return y + self.fast.scale * (x @ first.to(x.dtype).T) @ second.to(x.dtype).T


class _Holder(nn.Module):
    """A path to a stack of experts, as a model has one."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def choose(shape: Shape, draws: torch.Generator) -> torch.Tensor:
    """Return the experts of every token [B, L, K] int64, drawn without routing weights."""
    share = torch.ones(shape.num_experts)
    if shape.routing == "uneven":
        share = 1 / torch.arange(1, shape.num_experts + 1).float()
        share[-1] = 0.0
    share = share.expand(shape.rows * shape.length, -1)
    chosen = torch.multinomial(share, shape.top_k, generator=draws)
    return chosen.view(shape.rows, shape.length, shape.top_k)


def _fast_weights(
    experts: Experts,
    shape: Shape,
    is_wrapped: bool,
    device: torch.device,
    draws: torch.Generator,
) -> FastWeights:
    """Return one memory per row, away from phi_0, where B would hide what A does."""
    path = "experts.base_layer" if is_wrapped else "experts"
    sites = tuple(
        Site(f"experts.{name}", path, name, shape.num_experts, *experts.projection_shape(name))
        for name in experts.projections
    )
    source = torch.Generator(device).manual_seed(1)
    config = MemoryConfig(rank=RANK, alpha=ALPHA)
    fast = FastWeights(Placement(0, sites), config, shape.rows, device, source)
    for name, tensor in fast.tensors.items():
        values = torch.randn(tensor.shape, generator=draws).mul_(0.05).to(device)
        # In place: a memory's strides put experts first.
        fast.tensors[name] = tensor.copy_(values).requires_grad_()
    return fast


def _with_lora(experts: Experts, draws: torch.Generator) -> Any:
    """Return the adapter's layer around `experts`, away from its start, where B is zero."""
    from peft import LoraConfig

    from memdlm.backbones.adapters.expert_lora import ExpertLora

    config: Any = LoraConfig(r=RANK, lora_alpha=ALPHA)
    config.expert_projections = {"experts": experts.projections}
    layer = ExpertLora(experts, "default", config, RANK, ALPHA, "experts")
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=draws).mul_(0.05)
                parameter.copy_(values)
    return layer
