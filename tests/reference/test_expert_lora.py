"""Routed experts with an outer LoRA and fast weights against a plain loop over experts and rows."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F

from memdlm.backbones.adapters.expert_lora import ExpertLora
from memdlm.backbones.experts import Experts
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.placement import Placement, Site

ROWS, LENGTH, TOP_K, NUM_EXPERTS = 3, 7, 2, 6
RANK, ALPHA = 3, 5


class Holder(torch.nn.Module):
    """A path to a stack of experts, as a model has one."""

    def __init__(self, layer):
        super().__init__()
        self.experts = layer


def build(width, inner, dtype, projections, kind, num_rows):
    """Return an adapted stack and fast weights beside the adapter, everything drawn."""
    draws = torch.Generator().manual_seed(0)
    experts = Experts(NUM_EXPERTS, width, inner, "silu")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA)
    config.expert_projections = {"experts": projections}
    layer = ExpertLora(experts, "default", config, RANK, ALPHA, target_name="experts").to(dtype)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.3, generator=draws)
    sites = tuple(
        Site(
            f"experts.{name}",
            "experts.base_layer",
            name,
            NUM_EXPERTS,
            *experts.projection_shape(name),
        )
        for name in experts.projections
    )
    memory = MemoryConfig(kind=kind, rank=2, alpha=3.0)
    fast = FastWeights(Placement(0, sites), memory, num_rows, torch.device("cpu"), draws)
    for name, tensor in fast.tensors.items():
        fast.tensors[name] = torch.randn(tensor.shape, generator=draws) * 0.3
    return layer, fast


def plain(layer, fast, hidden, chosen, weights):
    """Loop over rows, tokens and chosen experts; hidden [B, P, H], chosen and weights [B, P, K]."""
    experts = layer.base_layer
    half = experts.intermediate_size

    def project(x, weight, name, expert, row):
        y = weight @ x
        if name in layer.lora_A["default"]:
            first, second = (f["default"][name][expert] for f in (layer.lora_A, layer.lora_B))
            y = y + ALPHA / RANK * second @ (first @ x)
        row = row if fast.num_rows > 1 else 0
        parts = {
            factor: fast.tensors[key][row, expert].to(x.dtype)
            for factor in ("A", "B", "delta")
            if (key := f"experts.{name}.{factor}") in fast.tensors
        }
        if "delta" in parts:
            return y + parts["delta"] @ x
        return y + fast.scale * parts["B"] @ (parts["A"] @ x)

    out = torch.zeros_like(hidden)
    for row, token in itertools.product(range(hidden.shape[0]), range(hidden.shape[1])):
        for slot in range(chosen.shape[-1]):
            expert = int(chosen[row, token, slot])
            x = hidden[row, token]
            gate = project(x, experts.gate_up_proj[expert, :half], "gate_proj", expert, row)
            up = project(x, experts.gate_up_proj[expert, half:], "up_proj", expert, row)
            y = project(F.silu(gate) * up, experts.down_proj[expert], "down_proj", expert, row)
            out[row, token] += weights[row, token, slot] * y
    return out


def choose(routing):
    """Return experts [B, P, K]: expert 0 gets nothing, and 1 only what `routing` says."""
    draws = torch.Generator().manual_seed(2)
    chosen = torch.stack(
        [torch.randperm(NUM_EXPERTS - 2, generator=draws)[:TOP_K] + 2 for _ in range(ROWS * LENGTH)]
    ).view(ROWS, LENGTH, TOP_K)
    if routing == "one row only":
        chosen[0, :, 0] = 1
    elif routing == "all to one":
        chosen[..., 0], chosen[..., 1] = 1, 5
    return chosen


@pytest.mark.parametrize("routing", ["one row only", "all to one"])
@pytest.mark.parametrize("num_rows", [1, ROWS])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    "projections", [Experts.projections, ("gate_proj",), ("up_proj", "down_proj")]
)
@pytest.mark.parametrize(
    # Widths that need no padding for the grouped kernel, and widths that do.
    ("dtype", "width", "inner", "tolerance"),
    [
        (torch.float64, 16, 12, 1e-12),
        (torch.float32, 16, 12, 1e-5),
        (torch.float32, 15, 7, 1e-5),
        (torch.bfloat16, 16, 12, 0.05),
    ],
)
def test_forward_and_backward_equal_the_loop(
    dtype, width, inner, tolerance, projections, kind, num_rows, routing
):
    layer, fast = build(width, inner, dtype, projections, kind, num_rows)
    chosen = choose(routing)
    draws = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, LENGTH, width, generator=draws).to(dtype).requires_grad_()
    weights = torch.rand(ROWS, LENGTH, TOP_K, generator=draws).to(dtype).requires_grad_()
    towards = torch.randn(ROWS, LENGTH, width, generator=draws).to(dtype)
    layer.base_layer.requires_grad_(True)
    results = []
    for is_grouped in (True, False):
        fast.tensors = {n: t.detach().double().requires_grad_() for n, t in fast.tensors.items()}
        if is_grouped:
            with fast.attached(Holder(layer)):
                out = layer(hidden.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1))
            out = out.view_as(hidden)
        else:
            out = plain(layer, fast, hidden, chosen, weights)
        inputs = {"hidden": hidden, "weights": weights, **dict(layer.named_parameters())}
        inputs.update(fast.tensors)
        grads = torch.autograd.grad((out * towards).sum(), list(inputs.values()))
        results.append({"out": out.detach(), **dict(zip(inputs, grads, strict=True))})
    assert any("lora_A" in name for name in results[0])
    for name, expected in results[1].items():
        difference = (results[0][name] - expected).double().norm()
        assert difference <= tolerance * expected.double().norm(), name


def test_an_expert_without_tokens_gets_a_zero_gradient_and_not_none():
    layer, _ = build(16, 12, torch.float32, Experts.projections, "lora", 1)
    chosen = choose("all to one").flatten(0, 1)
    layer(torch.randn(len(chosen), 16), chosen, torch.ones(chosen.shape)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            used = parameter.grad.flatten(1).any(dim=1)
            assert used.tolist() == [False, True, False, False, False, True], name


def test_dropout_falls_on_the_adapters_inputs_alone():
    layer, _ = build(16, 12, torch.float32, Experts.projections, "lora", 1)
    chosen = choose("one row only").flatten(0, 1)
    arguments = torch.randn(len(chosen), 16), chosen, torch.ones(chosen.shape)
    without = layer.base_layer(*arguments)
    layer.lora_dropout["default"] = torch.nn.Dropout(1.0)
    assert torch.equal(layer.train()(*arguments), without)
    assert not torch.allclose(layer.eval()(*arguments), without)


def test_the_start_is_that_of_peft_for_each_expert():
    config = SimpleNamespace(expert_projections={"experts": Experts.projections}, use_rslora=True)
    config.lora_dropout, config.inference_mode, config.init_lora_weights = 0.0, False, True
    torch.manual_seed(0)
    layer = ExpertLora(Experts(40, 64, 16, "silu"), "default", config, 8, 4, target_name="experts")
    assert layer.scaling["default"] == 4 / 8**0.5
    for name, width in (("gate_proj", 64), ("up_proj", 64), ("down_proj", 16)):
        torch.manual_seed(1)
        one = torch.nn.Linear(width, 8, bias=False).weight  # what PEFT draws for a linear layer
        first = layer.lora_A["default"][name]
        assert first.abs().max() <= one.abs().max() * 1.05
        torch.testing.assert_close(first.std(), one.std(), rtol=0.1, atol=0)
        assert not layer.lora_B["default"][name].any()
        assert not torch.equal(first[0], first[1])
