import pytest

from memdlm.errors import UsageError
from memdlm.planning.gpus import GIB, GPUS, find_gpu, reserve


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("a100-80gb", 80 * GIB),
        ("H100", 80 * GIB),
        ("h200", 141e9),
        ("24", 24 * GIB),
        ("22.5GiB", 22.5 * GIB),
        ("40gb", 40 * GIB),
    ],
)
def test_a_gpu_is_a_name_or_a_number_of_gibibytes(text, size) -> None:
    assert find_gpu(text).memory == size


@pytest.mark.parametrize("text", ["rtx9999", "", "-3", "nan", "0", "1e9"])
def test_anything_else_is_refused_with_the_names(text) -> None:
    with pytest.raises(UsageError, match="rtx3090") as caught:
        find_gpu(text)
    assert all(name in str(caught.value) for name in GPUS)


def test_the_margin_is_what_tensors_and_reserve_leave() -> None:
    gpu, peak = find_gpu("24"), 20 * GIB
    assert gpu.margin(peak) == gpu.memory - peak - reserve(peak) == 2 * GIB
    assert gpu.margin(23 * GIB) < 0
