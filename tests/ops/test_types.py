import pytest
import torch

pytest.importorskip("triton")
from triton import language as tl

from minegan_fast.kernels._types import wide_dtype
from minegan_fast.ops import _op


@pytest.mark.parametrize("dtype", _op.DTYPE_CODES)
def test_kernels_compute_in_the_type_that_the_ops_give(dtype):
    assert wide_dtype(dtype).primitive_bitwidth == 8 * _op.wide_dtype(dtype).itemsize
    assert wide_dtype(dtype) in (tl.float32, tl.float64)
    assert _op.wide_dtype(dtype) == torch.promote_types(dtype, torch.float32)
