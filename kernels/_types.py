"""Element types as Triton names them."""

import torch
from triton import language as tl


def wide_dtype(dtype: torch.dtype) -> tl.dtype:
    """The type in which elements of this one are summed and computed with: float32, for float64 float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32
