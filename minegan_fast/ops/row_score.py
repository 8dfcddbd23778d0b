"""Evidence of many gradients reduced to neurons in one call.

    totals[start + r] + factor Σ_{e in row r} t(g_e, w_e)        t = g² | |g| | g·w

for every gradient g of a list and every row r of it: a slice along the gradient's row axis, which is a neuron's part of
that parameter. Squares give the Fisher information, products with the weights the saliency (first-order change of the
loss when the neuron is removed). All arithmetic is float64: the square of a half-precision gradient neither overflows
nor underflows. Nothing here is differentiable.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._op import DTYPE_CODES, Op

KINDS = ("square", "abs", "product")  # Kind in csrc/ops.h


@Op
def row_score_add(
    totals: Tensor,
    grads: list[Tensor],
    weights: list[Tensor],
    axes: list[int],
    starts: list[int],
    kind: str,
    factor: float,
) -> Tensor:
    out = totals.clone()
    for i, (g, axis, start) in enumerate(zip(grads, axes, starts, strict=True)):
        g = g.double()
        terms = g * weights[i].double() if kind == "product" else g.square() if kind == "square" else g.abs()
        if g.dim():
            terms = terms.sum([d for d in range(g.dim()) if d != axis]) if g.dim() > 1 else terms
        out[start : start + terms.numel()] += factor * terms
    return out


def row_score(
    totals: Tensor,
    grads: Sequence[Tensor],
    starts: Sequence[int],
    *,
    axes: Sequence[int] | None = None,
    weights: Sequence[Tensor] | None = None,
    kind: str = "square",
    factor: float = 1.0,
) -> Tensor:
    """totals plus the rows' sums of all gradients; one or two launches for the whole list on a GPU.

    Args:
        totals: float64 [N].
        grads: tensors of any shape, float32, float64, bfloat16 or float16, on the device of totals. Dense ones (also
            channels-last) are read as they lie in memory, others are copied first. A 0-dimensional one is one row.
        starts: for each gradient where in totals its rows begin; the ranges must not overlap.
        axes: for each gradient the axis along which its rows lie, may be negative; default 0.
        weights: for kind "product" what each gradient is multiplied by: tensors of its shape and dtype.
        kind: "square" Σ g² | "abs" Σ |g| | "product" Σ g·w.
        factor: on the sums, finite.

    Returns:
        float64 [N], a new tensor. Sums run in a fixed order that depends on a gradient's shape alone: the same inputs
        give the same bits, on any number of threads.

    Raises:
        TypeError, ValueError: an argument is not as said above; the message names it.
        RuntimeError: a backend is forced (`use_backend`, MINEGAN_BACKEND) that is missing here; or a CUDA graph is
            under capture, where only the backend "reference" can run.
    """
    grads, starts = [g.detach() for g in grads], list(starts)
    weights = [w.detach() for w in weights or ()]
    axes = [0] * len(grads) if axes is None else list(axes)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if totals.dtype != torch.float64 or totals.dim() != 1:
        raise TypeError(f"totals must be float64 [N], got {totals.dtype} {list(totals.shape)}")
    if not math.isfinite(factor):
        raise ValueError(f"factor must be finite, got {factor}")
    if not len(grads) == len(starts) == len(axes) or len(weights) != (len(grads) if kind == "product" else 0):
        raise ValueError(
            f"grads, starts, axes{' and weights' if kind == 'product' else ''} must be equally many, and weights are "
            f"for kind 'product' alone; got {len(grads)}, {len(starts)}, {len(axes)} and {len(weights)}"
        )
    ranges = []
    for i, (g, axis, start) in enumerate(zip(grads, axes, starts, strict=True)):
        if g.layout != torch.strided or g.dtype not in DTYPE_CODES:
            raise TypeError(f"grads[{i}] must be a dense float32, float64, bfloat16 or float16 tensor, got {_kind(g)}")
        if g.device != totals.device:
            raise ValueError(f"grads[{i}] must be on the device of totals, {totals.device}, got {g.device}")
        ndim = max(g.dim(), 1)
        if not -ndim <= axis < ndim:
            raise ValueError(f"axes[{i}] must be an axis of grads[{i}], whose shape is {list(g.shape)}, got {axis}")
        axes[i] = axis % ndim
        ranges.append((start, start + (g.shape[axis] if g.dim() else 1), i))
    for i, (g, w) in enumerate(zip(grads, weights, strict=False)):
        if w.shape != g.shape or w.dtype != g.dtype or w.device != g.device:
            raise ValueError(
                f"weights[{i}] must be a {g.dtype} tensor {list(g.shape)} on {g.device} as grads[{i}] is, got "
                f"{w.dtype} {list(w.shape)} on {w.device}"
            )
    end, last = 0, None
    for start, stop, i in sorted(ranges):
        if start < end:
            what = f"overlap the rows of grads[{last}]" if last is not None else "begin before totals does"
            raise ValueError(f"starts[{i}] = {start} makes rows that {what}; give every gradient rows of its own")
        if stop > len(totals):
            raise ValueError(f"starts[{i}] = {start} makes rows that end at {stop}; totals has {len(totals)} elements")
        end, last = stop, i
    return row_score_add(totals, grads, weights, axes, starts, kind, float(factor))


def _kind(x: Tensor) -> str:
    return f"{x.dtype}" if x.layout == torch.strided else f"a {x.layout} one"


# Launchers. row_score saw to shapes, dtypes, devices and to rows that do not overlap.


def dense_table(
    grads: list[Tensor], weights: list[Tensor], axes: list[int], starts: list[int]
) -> dict[torch.dtype, tuple[list[tuple[int, ...]], list[Tensor | None]]]:
    """For each dtype the rows that a kernel reads, and the tensors that must live until it has read them.

    A row is (g's address, w's address or 0, outer, C, inner, start), one for each gradient that has elements. Tensors
    that are not dense are copied, and the copies are among those that must live.
    """
    tables: dict[torch.dtype, tuple[list, list]] = {}
    for i, (g, axis, start) in enumerate(zip(grads, axes, starts, strict=True)):
        if g.numel() == 0:
            continue
        w = weights[i] if weights else None
        if not (g.is_contiguous() or _dense(g)):
            g = g.contiguous()
        if w is not None and w.stride() != g.stride():
            w = torch.empty_like(g).copy_(w)
        C = g.shape[axis] if g.dim() else 1
        inner = g.numel() if C == 1 else g.stride(axis)
        rows, kept = tables.setdefault(g.dtype, ([], []))
        rows.append((g.data_ptr(), 0 if w is None else w.data_ptr(), g.numel() // (C * inner), C, inner, start))
        kept += (g, w)
    return tables


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in any order of the axes."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


@row_score_add.register("cpp", (torch.float64,))
def _(native, totals, grads, weights, axes, starts, kind, factor):
    out = totals.clone()
    for dtype, (rows, _kept) in dense_table(grads, weights, axes, starts).items():
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        codes, threads = (DTYPE_CODES[dtype], KINDS.index(kind)), torch.get_num_threads()
        native.row_score_cpu(*codes, table.data_ptr(), len(rows), out.data_ptr(), factor, threads)
    return out


@row_score_add.register("triton", (torch.float64,))
def _(kernels, totals, grads, weights, axes, starts, kind, factor):
    if totals.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "row_score copies the addresses of the gradients from memory of the host that a CUDA graph under capture "
            "would not keep; score outside the graph, or take use_backend('reference')"
        )
    out = totals.clone()
    for dtype, (rows, kept) in dense_table(grads, weights, axes, starts).items():
        kernels.row_score(rows, kept, dtype, out, kind, factor)
    return out
