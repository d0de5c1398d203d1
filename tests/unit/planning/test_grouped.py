import pytest
import torch
from torch.nn import functional as F

from memdlm.planning.grouped import grouped_mm_result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("a", "b"), [((16, 8), (3, 8, 24)), ((8, 16), (16, 24)), ((3, 8, 16), (3, 16, 24))]
)
def test_it_has_the_shape_and_type_of_the_real_product(a, b, dtype) -> None:
    left, right = torch.randn(a, dtype=dtype), torch.randn(b, dtype=dtype)
    ends = None if len(a) == len(b) == 3 else torch.tensor([4, 4, 16], dtype=torch.int32)
    real = F.grouped_mm(left, right, offs=ends)
    found = grouped_mm_result(left, right, ends)
    assert (found.shape, found.dtype) == (real.shape, real.dtype)
    assert found.untyped_storage().nbytes() == real.untyped_storage().nbytes()
