"""The distance |p - q|_1 of every row of p [r, D] from every row of q [c, D], and what its derivatives need.

    distance    t_ij   = sum over d of |p_id - q_jd|
    slopes      s_ij   = sum over d of sign(p_id - q_jd) (hp_id - hq_jd)        its derivative along h
    signs       out_id = sum over j of A_ij sign(p_id - q_jd)                   the gradient of sum A t by p

The gradient by q is that of the transposed problem, signs(A^T, q, p). sign(0) = 0, the subgradient at a kink. No tensor
[r, c, D] is made.
"""

import torch
from torch import Tensor

from ._op import Op

_ELEMENTS = 1 << 21  # of the reference's largest temporary


def _rows(p: Tensor, q: Tensor):
    step = max(1, _ELEMENTS // max(1, q.numel()))
    return ((i, min(i + step, len(p))) for i in range(0, len(p), step))


@Op
def manhattan_distance(p: Tensor, q: Tensor) -> Tensor:
    """[r, c]; the rows of p and q, here and below, are contiguous and of one dtype."""
    return torch.cdist(p, q, p=1.0)


@Op
def manhattan_slopes(p: Tensor, q: Tensor, hp: Tensor, hq: Tensor) -> Tensor:
    """[r, c]."""
    out = p.new_empty(len(p), len(q))
    for i, j in _rows(p, q):
        out[i:j] = (torch.sign(p[i:j, None] - q) * (hp[i:j, None] - hq)).sum(2)
    return out


@Op
def manhattan_signs(A: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """[r, D], for A [r, c] of any strides."""
    out = torch.empty_like(p)
    for i, j in _rows(p, q):
        out[i:j] = torch.einsum("nm,nmd->nd", A[i:j], torch.sign(p[i:j, None] - q))
    return out


@manhattan_distance.register("cpp", dtypes=(torch.float32,))
def _(native, p, q):
    t = p.new_empty(len(p), len(q))
    sizes = len(p), len(q), p.shape[1]
    native.manhattan_distance_cpu(p.data_ptr(), q.data_ptr(), t.data_ptr(), sizes, torch.get_num_threads())
    return t


@manhattan_slopes.register("cpp", dtypes=(torch.float32,))
def _(native, p, q, hp, hq):
    s = p.new_empty(len(p), len(q))
    addresses = [tensor.data_ptr() for tensor in (p, q, hp, hq, s)]
    native.manhattan_slopes_cpu(*addresses, (len(p), len(q), p.shape[1]), torch.get_num_threads())
    return s


@manhattan_signs.register("cpp", dtypes=(torch.float32,))
def _(native, A, p, q):
    out, A = p.new_empty(p.shape), A.contiguous()
    addresses = [tensor.data_ptr() for tensor in (A, p, q, out)]
    native.manhattan_signs_cpu(*addresses, (len(p), len(q), p.shape[1]), torch.get_num_threads())
    return out


@manhattan_distance.register("triton", dtypes=(torch.float32,))
def _(kernels, p, q):
    return kernels.pairs(p, q, None, None)


@manhattan_slopes.register("triton", dtypes=(torch.float32,))
def _(kernels, p, q, hp, hq):
    return kernels.pairs(p, q, hp, hq)


@manhattan_signs.register("triton", dtypes=(torch.float32,))
def _(kernels, A, p, q):
    return kernels.signs(A, p, q)
