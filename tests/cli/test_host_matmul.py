"""Products of oneDNN in the place of MKL's: the same numbers, gradients too, and a way back."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memdlm.cli import host_matmul
from memdlm.cli.host_matmul import OneDnnProducts, speed_up_products

has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
pytestmark = pytest.mark.skipif(not has_both, reason="a PyTorch without MKL or oneDNN")

LARGE, SMALL = (1024, 64, 48), (16, 64, 48)


@pytest.fixture
def products() -> Iterator[OneDnnProducts]:
    """Let oneDNN multiply, whatever the processor."""
    in_force = OneDnnProducts()
    yield in_force
    in_force.end()


def pair(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    rows, inner, columns = shape
    torch.manual_seed(0)
    return [torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)]


def calls(products: OneDnnProducts, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that fills with the shapes that oneDNN multiplies."""
    seen: list[tuple[int, ...]] = []
    linear = products._linear

    def count(left: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append((*left.shape, weight.shape[0]))
        product: torch.Tensor = linear(left, weight, *rest)
        return product

    monkeypatch.setattr(products, "_linear", count)
    return seen


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_large_product_is_onednns_and_the_same(
    products: OneDnnProducts, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    seen = calls(products, monkeypatch)
    left, right = pair(LARGE)
    if layout == "transposed":
        right = right.t().contiguous().t()
    exact = left.double() @ right.double()
    assert not seen, "float64 is not oneDNN's"
    torch.testing.assert_close((left @ right).double(), exact, rtol=1e-5, atol=1e-4)
    assert seen == [LARGE]


def test_gradients_of_a_linear_layer_are_products_too(
    products: OneDnnProducts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls(products, monkeypatch)
    inputs, weight = pair(LARGE)
    leaves = [inputs.requires_grad_(), weight.t().contiguous().requires_grad_()]
    torch.nn.functional.linear(*leaves).square().sum().backward()
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    torch.nn.functional.linear(*doubles).square().sum().backward()
    assert len(seen) == 3
    for ours, exact in zip(leaves, doubles, strict=True):
        assert ours.grad is not None and exact.grad is not None
        scale = exact.grad.abs().max()
        torch.testing.assert_close(
            ours.grad.double() / scale, exact.grad / scale, rtol=0, atol=1e-5
        )


def test_small_and_strided_products_stay_mkls_bit_by_bit(
    products: OneDnnProducts, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = pair(SMALL), pair(LARGE)
    strided = [large[0], torch.cat([large[1], large[1]], dim=1)[:, ::2]]
    seen = calls(products, monkeypatch)
    within = [left @ right for left, right in (small, strided)]
    assert not seen
    products.end()
    for ours, (left, right) in zip(within, (small, strided), strict=True):
        assert torch.equal(ours, left @ right)


def test_shapes_that_do_not_fit_are_refused_in_pytorchs_words(products: OneDnnProducts) -> None:
    left, _ = pair(LARGE)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.mm(left, torch.randn(LARGE[1] + 1, LARGE[2]))


def test_modes_such_as_flop_counters_still_see_the_product(products: OneDnnProducts) -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    left, right = pair(LARGE)
    with Watch():
        torch.mm(left, right)
    assert seen == [torch.ops.aten.mm.default]


def test_it_is_done_once_on_amd_with_avx512_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_matmul, "_in_force", None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(host_matmul, "_amd_family", lambda: None)
    assert speed_up_products() is None
    monkeypatch.setattr(host_matmul, "_amd_family", lambda: 26)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert speed_up_products() is None, "whoever limits oneDNN is left alone"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert speed_up_products() is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    products = speed_up_products()
    assert products is not None
    try:
        assert speed_up_products() is products
    finally:
        products.end()
    assert host_matmul._in_force is None


def test_half_as_wide_multipliers_need_larger_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_matmul, "_in_force", None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    fewest = []
    for family in (25, 26):
        monkeypatch.setattr(host_matmul, "_amd_family", lambda family=family: family)
        products = speed_up_products()
        assert products is not None
        fewest.append(products.fewest)
        products.end()
    assert fewest[0] > fewest[1]


@pytest.mark.parametrize(
    ("processor", "family"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", 25),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", None),
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", 26),
        ("arm", None),
    ],
)
def test_the_family_of_the_processor_is_read(
    monkeypatch: pytest.MonkeyPatch, processor: str, family: int | None
) -> None:
    monkeypatch.setattr(host_matmul.Path, "read_text", lambda path, encoding: processor)
    assert host_matmul._amd_family() == family

    def no_linux(path: object, encoding: str) -> str:
        raise OSError

    monkeypatch.setattr(host_matmul.Path, "read_text", no_linux)
    monkeypatch.setattr(host_matmul.platform, "processor", lambda: processor)
    assert host_matmul._amd_family() == family
