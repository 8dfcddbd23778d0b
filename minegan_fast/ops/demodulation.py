"""The demodulation coefficients of StyleGAN2: what each output of a modulated convolution is divided by (Karras et al.
2020, eq. 3), from styles and a weight.

    forward    q_oi = sum_k W_oik^2,     d_bo = (sum_i s_bi^2 q_oi + eps)^(-1/2)
    backward   g = -gd d^3 / 2,     gs_bi = 2 s_bi sum_o g_bo q_oi,     gW_oik = 2 W_oik sum_b g_bo s_bi^2

The first derivative is computed by these equations, a second one by PyTorch from the same equations. gW is that of the
rows that train alone. s [B, I], W [O, I, k, k], q [O, I], d and gd [B, O].
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ._op import DTYPE_CODES, Op, backward_wants, forced_backend, refuse_transforms, run

# What the kernels read: a weight of another dtype is converted first.
_DTYPES = torch.float32, torch.float64


@Op
def demodulation_forward(s: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """d and q; weight [O, I, n] of the dtype of s, any strides."""
    q = weight.square().sum(2)
    return torch.rsqrt(F.linear(s.square(), q) + eps), q


@Op
def demodulation_styles(gd: Tensor, d: Tensor, s: Tensor, q: Tensor) -> Tensor:
    """gs."""
    return (-gd * d**3) @ q * s


@Op
def demodulation_rows(gd: Tensor, d: Tensor, s: Tensor, trained: Tensor, rows: Tensor | None) -> Tensor:
    """gW [r, I, n], of the rows `trained` [r, I, n] of the weight, which are all of them where rows is None."""
    g = -gd * d**3
    g = g if rows is None else g.index_select(1, rows)
    return trained * (g.t() @ s.square())[:, :, None]


class _Demodulation(Function):
    """weight: all rows, without a graph; None where `trained` is all of them."""

    @staticmethod
    def forward(ctx, s, trained, weight, rows, eps, backend):
        d, q = demodulation_forward(s, trained if weight is None else weight, eps, backend=backend)
        ctx.rows, ctx.eps, ctx.backend = rows, eps, backend
        ctx.save_for_backward(s, trained, weight, d, q)
        return d

    @staticmethod
    def backward(ctx, gd):
        refuse_transforms("modulated_conv2d", gd)
        s, trained, weight, d, q = ctx.saved_tensors
        rows, wants = ctx.rows, (backward_wants(ctx, 0), backward_wants(ctx, 1))
        gs = gW = None
        if torch.is_grad_enabled():
            if trained is not None:
                own = trained.square().sum(2)
                q = own if weight is None else q.index_copy(0, rows, own)
            d = torch.rsqrt(F.linear(s.square(), q) + ctx.eps)
            if wants[0]:
                gs = demodulation_styles.reference(gd, d, s, q)
            if wants[1] and trained is not None:
                gW = demodulation_rows.reference(gd, d, s, trained, rows)
            return gs, gW, None, None, None, None
        gd = gd.contiguous()
        if wants[0]:
            gs = demodulation_styles(gd, d, s, q, backend=ctx.backend)
        if wants[1]:
            gW = demodulation_rows(gd, d, s, trained, rows, backend=ctx.backend)
        return gs, gW, None, None, None, None


def demodulation(s: Tensor, trained: Tensor | None, weight: Tensor | None, rows: Tensor | None, eps: float) -> Tensor:
    """d [B, O], in the dtype of s.

    Args:
        s: [B, I], float32 or float64.
        trained: [r, I, k, k] of any floating dtype, the rows that have a gradient: all of them where weight is None.
        weight: [O, I, k, k] with the present values of all rows, without a graph; None where `trained` is that.
        rows: int64 [r], which rows of weight are trained; None where weight or trained is.
        eps: added to the squared norm.
    """
    trained, weight = (w if w is None else w.to(s.dtype).flatten(2) for w in (trained, weight))
    return run(_Demodulation, s.contiguous(), trained, weight, rows, eps, forced_backend())


# Launchers. s, d, gd, q and rows are contiguous.


def _rows(weight: Tensor) -> tuple[int, ...]:
    """WeightRows in csrc/ops.h."""
    return *weight.shape, *weight.stride()


def _laid_out(trained: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, and a place for their gradient with the same strides."""
    gW = torch.empty_like(trained)
    return (trained if trained.stride() == gW.stride() else trained.contiguous()), gW


@demodulation_forward.register("cpp", dtypes=_DTYPES)
def _(native, s, weight, eps):
    d, q = s.new_empty(len(s), len(weight)), s.new_empty(weight.shape[:2])
    code, addresses = DTYPE_CODES[s.dtype], [t.data_ptr() for t in (s, weight, d, q)]
    native.demodulation_cpu(code, *addresses, len(s), _rows(weight), eps, torch.get_num_threads())
    return d, q


@demodulation_styles.register("cpp", dtypes=_DTYPES)
def _(native, gd, d, s, q):
    gs, sizes = torch.empty_like(s), (*d.shape, s.shape[1])
    code, addresses = DTYPE_CODES[s.dtype], [t.data_ptr() for t in (gd, d, s, q, gs)]
    native.demodulation_styles_cpu(code, *addresses, sizes, torch.get_num_threads())
    return gs


@demodulation_rows.register("cpp", dtypes=_DTYPES)
def _(native, gd, d, s, trained, rows):
    trained, gW = _laid_out(trained)
    code, addresses = DTYPE_CODES[s.dtype], [0 if t is None else t.data_ptr() for t in (gd, d, s, trained, rows, gW)]
    native.demodulation_rows_cpu(code, *addresses, *d.shape, _rows(trained), torch.get_num_threads())
    return gW


@demodulation_forward.register("triton", dtypes=_DTYPES)
def _(kernels, s, weight, eps):
    return kernels.forward(s, weight, eps)


@demodulation_styles.register("triton", dtypes=_DTYPES)
def _(kernels, gd, d, s, q):
    return kernels.styles(gd, d, s, q)


@demodulation_rows.register("triton", dtypes=_DTYPES)
def _(kernels, gd, d, s, trained, rows):
    trained, gW = _laid_out(trained)
    kernels.rows_gradient(gd, d, s, trained, rows, gW)
    return gW
