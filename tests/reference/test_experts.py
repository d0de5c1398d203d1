"""Grouped experts with fast weights against a plain loop over tokens, experts and rows."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from memdlm.backbones.experts import Experts
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.placement import Placement, Site

ROWS, LENGTH, TOP_K = 3, 5, 2


class Holder(torch.nn.Module):
    """A path to a stack of experts, as a model has one."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts


def build(num_experts, width, inner, dtype, kind, num_rows):
    draws = torch.Generator().manual_seed(0)
    experts = Experts(num_experts, width, inner, "silu").to(dtype)
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.3, generator=draws)
    sites = tuple(
        Site(f"experts.{name}", "experts", name, num_experts, *experts.projection_shape(name))
        for name in experts.projections
    )
    fast = FastWeights(Placement(0, sites), MemoryConfig(kind=kind, rank=3), num_rows, "cpu", draws)
    for name, tensor in fast.tensors.items():
        fast.tensors[name] = torch.randn(tensor.shape, generator=draws) * 0.3
    return experts, fast


def plain(experts, fast, hidden, chosen, weights):
    """Loop over rows, tokens and chosen experts; hidden [B, P, H], chosen and weights [B, P, K]."""
    half = experts.intermediate_size

    def project(x, weight, name, expert, row):
        y = weight @ x
        row = row if fast.num_rows > 1 else 0

        def pick(factor):
            return fast.tensors[f"experts.{name}.{factor}"][row, expert].to(x.dtype)

        if f"experts.{name}.delta" in fast.tensors:
            return y + pick("delta") @ x
        return y + fast.scale * pick("B") @ (pick("A") @ x)

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


def uneven_choice(num_experts):
    """Expert 0 gets nothing, expert 1 something from row 0 alone, the others the rest."""
    draws = torch.Generator().manual_seed(2)
    chosen = torch.stack(
        [torch.randperm(num_experts - 2, generator=draws)[:TOP_K] + 2 for _ in range(ROWS * LENGTH)]
    ).view(ROWS, LENGTH, TOP_K)
    chosen[0, :, 0] = 1
    return chosen


# Widths that need no padding for the grouped kernel, and widths that do.
@pytest.mark.parametrize(("width", "inner"), [(16, 12), (15, 7)])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("num_rows", [1, ROWS])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.05)]
)
def test_forward_and_backward_equal_the_loop(width, inner, kind, num_rows, dtype, tolerance):
    num_experts = 6
    experts, fast = build(num_experts, width, inner, dtype, kind, num_rows)
    chosen = uneven_choice(num_experts)
    draws = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, LENGTH, width, generator=draws).to(dtype).requires_grad_()
    weights = torch.rand(ROWS, LENGTH, TOP_K, generator=draws).to(dtype).requires_grad_()
    towards = torch.randn(ROWS, LENGTH, width, generator=draws).to(dtype)
    results = []
    for is_grouped in (True, False):
        fast.tensors = {n: t.detach().double().requires_grad_() for n, t in fast.tensors.items()}
        if is_grouped:
            with fast.attached(Holder(experts)):
                out = experts(
                    hidden.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1)
                ).view_as(hidden)
        else:
            out = plain(experts, fast, hidden, chosen, weights)
        inputs = {"hidden": hidden, "weights": weights, **dict(experts.named_parameters())}
        inputs.update(fast.tensors)
        grads = torch.autograd.grad((out * towards).sum(), list(inputs.values()))
        results.append({"out": out.detach(), **dict(zip(inputs, grads, strict=True))})
    for name, expected in results[1].items():
        difference = (results[0][name] - expected).double().norm()
        assert difference <= tolerance * expected.double().norm(), name


def test_an_expert_without_tokens_gets_a_zero_gradient():
    experts, fast = build(6, 16, 12, torch.float32, "lora", ROWS)
    fast.tensors = {name: tensor.requires_grad_() for name, tensor in fast.tensors.items()}
    chosen = uneven_choice(6).flatten(0, 1)
    with fast.attached(Holder(experts)):
        out = experts(torch.randn(ROWS * LENGTH, 16), chosen, torch.ones(ROWS * LENGTH, TOP_K))
    grads = torch.autograd.grad(out.square().sum(), list(fast.tensors.values()))
    for grad in grads:
        assert (grad[:, 0] == 0).all()  # nobody chose expert 0
        assert (grad[1:, 1] == 0).all() and (grad[0, 1] != 0).any()  # only row 0 chose expert 1


def test_detaching_leaves_the_plain_experts():
    experts, fast = build(6, 16, 12, torch.float32, "full", 1)
    args = (torch.randn(10, 16), torch.randint(0, 6, (10, 2)), torch.ones(10, 2))
    before = experts(*args)
    with fast.attached(Holder(experts)):
        assert not torch.equal(experts(*args), before)
    assert torch.equal(experts(*args), before)
