"""4-bit experts: the same sums as plain ones with the dequantised weights, and nothing kept."""

import copy

import pytest
import torch
from bitsandbytes import functional
from torch.utils.checkpoint import checkpoint

from memdlm.backbones.experts import Experts
from memdlm.backbones.quantization import stored_bytes
from memdlm.backbones.quantization.experts import STACKS, QuantizedExperts, plan_pieces
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.placement import Placement, Site

EXPERTS, WIDTH, INNER, TOKENS, TOP_K = 6, 32, 24, 40, 2


def make_experts(width: int = WIDTH, inner: int = INNER) -> Experts:
    draws = torch.Generator().manual_seed(0)
    experts = Experts(EXPERTS, width, inner, "silu").bfloat16()
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.2, generator=draws)
    return experts


def dequantized(quantized: QuantizedExperts) -> Experts:
    """Return plain experts with the same weights."""
    plain = Experts(
        quantized.num_experts, quantized.hidden_size, quantized.intermediate_size, "silu"
    )
    for name in STACKS:
        setattr(plain, name, torch.nn.Parameter(quantized.dequantized(name)))
    return plain


def run(experts: Experts, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and gradient of the inputs; the last expert gets no token."""
    draws = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, experts.hidden_size, generator=draws).to(dtype).requires_grad_()
    chosen = torch.randint(0, EXPERTS - 1, (TOKENS, TOP_K), generator=draws)
    weights = torch.rand(TOKENS, TOP_K, generator=draws).to(dtype)
    output = experts(hidden, chosen, weights)
    (output.float() * torch.randn(output.shape, generator=draws)).sum().backward()
    assert hidden.grad is not None
    return output.detach(), hidden.grad


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("width", "inner"), [(WIDTH, INNER), (20, 12), (12, 5)])
def test_output_and_input_gradient_equal_those_of_the_dequantised_weights(
    width: int, inner: int, double: bool
) -> None:
    quantized = QuantizedExperts.from_experts(make_experts(width, inner), double=double)
    for got, expected in zip(run(quantized), run(dequantized(quantized)), strict=True):
        assert torch.equal(got, expected)


def test_pieces_change_no_output_and_no_gradient_but_by_rounding() -> None:
    whole = QuantizedExperts.from_experts(make_experts())
    pieces = QuantizedExperts.from_experts(make_experts(), piece_bytes=EXPERTS * 8 * WIDTH * 2)
    assert [pieces.layouts[name].num_pieces for name in STACKS] == [6, 4]
    for name in STACKS:
        # Blocks are the same, their scales are quantised in another order.
        torch.testing.assert_close(
            pieces.dequantized(name), whole.dequantized(name), rtol=0.02, atol=0.01
        )
    output, gradient = run(pieces)
    expected_output, expected_gradient = run(dequantized(pieces))
    assert torch.equal(output, expected_output)
    error = (gradient.float() - expected_gradient.float()).norm() / expected_gradient.float().norm()
    assert error < 0.01  # a few additions in bfloat16, of 2^-9 each


@pytest.mark.parametrize(
    ("shape", "limit", "pieces"),
    [
        ((256, 1024, 2048), 2**28, 4),  # LLaDA2-mini, gate and up
        ((256, 2048, 512), 2**28, 2),
        ((64, 2048, 2048), 2**28, 2),  # LLaDA-MoE
        ((4, 24, 32), 2**28, 1),
        ((4, 24, 32), 1, 3),  # eight features at least
        ((4, 10, 6), 1, 1),  # no eight features to cut off
    ],
)
def test_a_piece_is_as_large_as_the_limit_allows(shape, limit: int, pieces: int) -> None:
    assert plan_pieces(*shape, limit) == pieces


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_a_weight_takes_little_more_than_four_bits(double: bool, bits: float) -> None:
    sizes = Experts(64, 256, 128, "silu")
    quantized = QuantizedExperts(sizes, double=double)
    held = sum(p.numel() * p.element_size() for p in quantized.parameters())
    assert held * 8 / quantized.num_weights == pytest.approx(bits, rel=0.002)
    assert stored_bytes(quantized.num_weights, double) == pytest.approx(held, rel=0.002)


def test_the_bits_are_those_of_bitsandbytes() -> None:
    experts = make_experts(width=64, inner=64)
    quantized = QuantizedExperts.from_experts(experts)
    for name in STACKS:
        packed, state = functional.quantize_4bit(
            getattr(experts, name).detach(), compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(getattr(quantized, name).flatten(), packed.flatten())
        expected = functional.dequantize_4bit(packed, state)
        assert torch.equal(quantized.dequantized(name), expected)


@pytest.mark.parametrize(("width", "inner"), [(WIDTH, INNER), (20, 12), (12, 5)])
def test_the_weights_are_near_those_quantised_whatever_their_shape(width: int, inner: int) -> None:
    experts = make_experts(width, inner)
    quantized = QuantizedExperts.from_experts(experts)
    for name in STACKS:
        weight = getattr(experts, name).detach().float()
        error = (quantized.dequantized(name).float() - weight).norm() / weight.norm()
        assert 0.05 < error < 0.12  # of 16 values for normal weights: 0.09


def test_autograd_keeps_the_four_bits_alone() -> None:
    quantized = QuantizedExperts.from_experts(make_experts())
    inputs = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.full((EXPERTS,), TOKENS, dtype=torch.int32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = quantized.project("gate_up_proj", inputs, ends)
    own = {p.data_ptr() for p in quantized.parameters()}
    assert {t.data_ptr() for t in kept} - own == {ends.data_ptr()}
    assert len(kept) == 6
    output.sum().backward()
    assert inputs.grad is not None


def test_layers_that_run_again_give_the_same_gradient() -> None:
    quantized = QuantizedExperts.from_experts(make_experts())
    expected = run(quantized)

    class Checkpointed(torch.nn.Module):
        hidden_size = WIDTH

        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = checkpoint(quantized, *args, use_reentrant=False)
            return output

    for got, wanted in zip(run(Checkpointed()), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_cast_and_a_copy_leave_the_weights_as_they_are() -> None:
    quantized = QuantizedExperts.from_experts(make_experts())
    before = quantized.dequantized("down_proj")
    cast = copy.deepcopy(quantized).to(torch.bfloat16)
    assert {p.dtype for p in cast.parameters()} == {torch.uint8, torch.float32}
    assert torch.equal(cast.dequantized("down_proj"), before)
    assert torch.equal(quantized.to("cpu").half().dequantized("down_proj"), before)


def test_float32_states_are_computed_in_bfloat16_and_stay_float32() -> None:
    quantized = QuantizedExperts.from_experts(make_experts())
    output, gradient = run(quantized, torch.float32)
    assert output.dtype == gradient.dtype == torch.float32
    expected = run(dequantized(quantized))[0].float()
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = run(quantized, torch.float32)
    torch.testing.assert_close(under_autocast, output, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fast_weights_add_the_same_delta_as_on_plain_experts(kind: str) -> None:
    quantized = QuantizedExperts.from_experts(make_experts())
    plain = dequantized(quantized)
    draws = torch.Generator().manual_seed(2)
    sites = tuple(
        Site(f"experts.{name}", "experts", name, EXPERTS, *plain.projection_shape(name))
        for name in plain.projections
    )
    fast = FastWeights(Placement(0, sites), MemoryConfig(kind=kind, rank=3), 4, "cpu", draws)
    for name, tensor in fast.tensors.items():
        fast.tensors[name] = (torch.randn(tensor.shape, generator=draws) * 0.3).requires_grad_()
    results = []
    for experts in (quantized, plain):
        model = torch.nn.Module()
        model.experts = experts
        with fast.attached(model):
            output, gradient = run(experts)
        grads = [tensor.grad for tensor in fast.tensors.values()]
        results.append([output, gradient, *grads])
        for tensor in fast.tensors.values():
            tensor.grad = None
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_shapes_are_known_without_values() -> None:
    with torch.device("meta"):
        quantized = QuantizedExperts(Experts(EXPERTS, WIDTH, INNER, "silu"))
    hidden = torch.empty(TOKENS, WIDTH, device="meta", dtype=torch.bfloat16, requires_grad=True)
    chosen = torch.zeros(TOKENS, TOP_K, device="meta", dtype=torch.int64)
    weights = torch.empty(TOKENS, TOP_K, device="meta", dtype=torch.bfloat16)
    output = quantized(hidden, chosen, weights)
    output.sum().backward()
    assert output.shape == hidden.shape == hidden.grad.shape


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_it_compiles() -> None:
    quantized = QuantizedExperts.from_experts(make_experts())
    expected = run(quantized)
    compiled = torch.compile(quantized, fullgraph=True)
    compiled.hidden_size = quantized.hidden_size
    for got, wanted in zip(run(compiled), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)
