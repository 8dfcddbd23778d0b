"""The weight gradient of some output neurons of a linear layer or a convolution, and of no other.

With gy [B, k, *P] the gradient of the k neurons' outputs, d running over the kernel's taps and p, q over positions:

    linear        dW[r, i]    = sum_b   gy[b, r] x[b, i]
    convolution   dW[r, c, d] = sum_b,p gy[b, r, p] x[b, c', p stride + d dilation - padding]   c' = c in the group of r
    transposed    dW[r, c, d] = sum_b,q gy[b, r, q stride + d dilation - padding] x[b, c, q]

These are bilinear. With a cotangent V of dW, shaped like it, <dW, V> has the gradients

    convolution   dx = conv_transpose(gy, V),   dgy = conv(x, V)
    transposed    dx = conv(gy, V'),            dgy = conv_transpose(x, V')     V' = V with its first two axes swapped

which are PyTorch's own convolutions, differentiable in turn. A convolution's second-order weight gradient, of a
cotangent ddx of its input gradient, is the same op: dW = row_gradient(ddx, gy).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import Function

from .._torch import convolution_backward
from ._op import Op, forced_backend, refuse_transforms
from .checks import check_tensor


@Op
def row_gradient_convolution(
    x: Tensor,
    gy: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
    choose: bool,
    rows: Tensor | None = None,
) -> Tensor:
    """groups: 1, or k, where x holds k times the channels that one neuron sees. choose: whether the cross-over table
    decides between our kernel and the library's. rows: int64 [k], the channels of gy that the neurons are; None for
    all of them."""
    gy = _gathered(gy, rows)
    if x.numel() == 0 or gy.numel() == 0:
        return x.new_zeros(_weight_shape(x, gy.shape[1], kernel, groups))
    # The gradient of a transposed convolution is that of a convolution with its operands exchanged.
    small, big = (x, gy) if transposed else (gy, x)
    weight = big.new_empty(1).expand(small.shape[1], big.shape[1] // groups, *kernel)  # only its shape is read
    geometry = stride, padding, dilation, False, [0] * len(kernel), groups
    mask = False, True, False
    dW = convolution_backward(small, big, weight, None, *geometry, mask)[1]
    return (dW.transpose(0, 1) if transposed else dW).contiguous()


def _gathered(gy: Tensor, rows: Tensor | None, axis: int = 1) -> Tensor:
    return gy if rows is None else gy.index_select(axis, rows)


def _weight_shape(x: Tensor, k: int, kernel: Sequence[int], groups: int) -> list[int]:
    return [k, x.shape[1] // groups, *kernel]


class _RowGradient(Function):
    """rows: None where a derivative may be asked for."""

    @staticmethod
    def forward(ctx, x, gy, rows, *geometry):
        ctx.save_for_backward(x, gy)
        ctx.geometry = geometry
        forced = forced_backend()
        return row_gradient_convolution(x, gy, *geometry, forced is None, rows, backend=forced)

    @staticmethod
    def backward(ctx, V):
        (x, gy), (kernel, stride, padding, dilation, transposed, groups) = ctx.saved_tensors, ctx.geometry
        small, big = (x, gy) if transposed else (gy, x)
        weight = V.transpose(0, 1) if transposed else V
        spans = [
            (p - 1) * s - 2 * pad + d * (k - 1) + 1
            for p, s, pad, d, k in zip(small.shape[2:], stride, padding, dilation, kernel, strict=True)
        ]
        rest = [size - span for size, span in zip(big.shape[2:], spans, strict=True)]
        grads = {}
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[transposed]:
                grads["big"] = torch.convolution(small, weight, None, stride, padding, dilation, True, rest, groups)
            if ctx.needs_input_grad[not transposed]:
                nothing = [0] * len(kernel)
                grads["small"] = torch.convolution(big, weight, None, stride, padding, dilation, False, nothing, groups)
        order = ("small", "big") if transposed else ("big", "small")
        return *(grads.get(name) for name in order), None, *[None] * len(ctx.geometry)


def row_gradient(
    x: Tensor,
    gy: Tensor,
    kernel: Sequence[int] = (),
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    transposed: bool = False,
    groups: int = 1,
    group: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The weight gradient of k output neurons of a layer, differentiable any number of times in x and gy.

    Args:
        x: the layer's input: [..., I] of a linear layer, else [B, Ci, *S]; float32, float64, bfloat16 or float16, in
            any memory layout.
        gy: the gradient of the outputs of these neurons alone, [..., k], else [B, k, *P], or with `rows` that of all n
            outputs, [..., n], [B, n, *P]; of x's dtype and device.
        kernel: sizes of the kernel of a convolution in 1 to 3 dimensions; () is a linear layer.
        stride, padding, dilation: of the convolution, one number or one an axis; it pads with zeros.
        transposed: x is the input of a transposed convolution, and gy is of its outputs.
        groups: of the convolution; only 1 where it is transposed.
        group: int64 [k], the group that each of the neurons is in; needed with groups > 1 alone.
        rows: int64 [k], which of gy's outputs the neurons are. A kernel that can reads them where they are, the rest
            gather them.

    Returns:
        [k, I], [k, Ci / groups, *kernel], or [k, Ci, *kernel] for a transposed convolution (whose own weight is
        [Ci, k, *kernel]): contiguous, of x's dtype, summed in float32 at least.

    Raises:
        TypeError, ValueError: an argument is not as said above; the message names it.
        IndexError, RuntimeError: on a CPU, as of index_select, an element of rows is none of gy's outputs.
        RuntimeError: a backend is forced (`use_backend`, MINEGAN_BACKEND) that is missing here or takes no such tensor.
        NotImplementedError: inside a transform of torch.func, vmap, grad or jacrev say.
    """
    check_tensor(x, "x")
    check_tensor(gy, "gy")
    if gy.dtype != x.dtype or gy.device != x.device:
        raise TypeError(
            f"gy must have x's dtype and device, {x.dtype} on {x.device}, got {gy.dtype} on {gy.device}; "
            "convert it with gy.to(x)"
        )
    if rows is not None and (
        not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1 or rows.device != x.device
    ):
        kind = f"{rows.dtype} {list(rows.shape)} on {rows.device}" if isinstance(rows, Tensor) else rows
        raise ValueError(f"rows must be int64 [k] on {x.device}, got {kind}")
    n = len(kernel)
    if n == 0:
        if x.dim() == 0 or gy.dim() == 0 or x.shape[:-1] != gy.shape[:-1]:
            raise ValueError(
                f"x [..., I] and gy [..., k] must agree in all but the last axis, got {list(x.shape)}, {list(gy.shape)}"
            )
        gy, samples = _gathered(gy, rows, -1), math.prod(x.shape[:-1])
        with torch.autocast(x.device.type, enabled=False):
            return gy.reshape(samples, gy.shape[-1]).mT @ x.reshape(samples, x.shape[-1])
    if n > 3 or not all(isinstance(size, int) and size > 0 for size in kernel):
        raise ValueError(f"kernel must be (), for a linear layer, or 1 to 3 sizes above 0, got {tuple(kernel)}")
    stride, padding, dilation = (
        _per_axis(name, value, n, least)
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    )
    if x.dim() != n + 2 or gy.dim() != n + 2 or x.shape[0] != gy.shape[0]:
        raise ValueError(
            f"with a kernel of {n} sizes x must be [B, Ci, *S] and gy [B, k, *P] with {n + 2} axes and one B, "
            f"got {list(x.shape)} and {list(gy.shape)}; unsqueeze(0) makes a batch of one sample"
        )
    small, big = (x, gy) if transposed else (gy, x)
    outputs = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(big.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    if list(small.shape[2:]) != outputs:
        raise ValueError(
            f"{'x' if transposed else 'gy'} must have the positions {outputs} that kernel {tuple(kernel)}, "
            f"stride {tuple(stride)}, padding {tuple(padding)} and dilation {tuple(dilation)} make of "
            f"{'gy' if transposed else 'x'}'s {list(big.shape[2:])}, got {list(small.shape[2:])}"
        )
    if groups != 1 and transposed:
        raise ValueError(f"groups must be 1 for a transposed convolution, got {groups}")
    return gradient_of_rows(x, gy, list(kernel), stride, padding, dilation, bool(transposed), groups, group, rows)


def gradient_of_rows(
    x: Tensor,
    gy: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
    group: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    """`row_gradient` of a convolution whose arguments are known to fit."""
    # A gradient of gy is one of all its outputs, and of groups each neuron gets its own x.
    differentiable = torch.is_grad_enabled() and (x.requires_grad or gy.requires_grad)
    if groups != 1 or differentiable:
        gy, rows = _gathered(gy, rows), None
    if gy.shape[1] == 0 or (rows is not None and rows.shape[0] == 0):
        return x.new_zeros(0, x.shape[1] // groups, *kernel)
    if groups != 1:
        x, groups = _own_channels(x, gy, groups, group), gy.shape[1]
    refuse_transforms("row_gradient")
    geometry = kernel, stride, padding, dilation, transposed, groups
    if differentiable:
        return _RowGradient.apply(x, gy, rows, *geometry)
    forced = forced_backend()
    return row_gradient_convolution(x, gy, *geometry, forced is None, rows, backend=forced)


def _per_axis(name: str, value: int | Sequence[int], n: int, least: int) -> list[int]:
    values = [value] * n if isinstance(value, int) else list(value)
    if len(values) != n or not all(isinstance(v, int) and v >= least for v in values):
        raise ValueError(f"{name} must be a number >= {least}, or {n} of them (one an axis of kernel), got {value!r}")
    return values


def _own_channels(x: Tensor, gy: Tensor, groups: int, group: Tensor | None) -> Tensor:
    """[B, k Ci / groups, *S]: the channels that each neuron sees, one neuron after the other."""
    if not isinstance(groups, int) or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide x's {x.shape[1]} channels, got {groups}")
    k = gy.shape[1]
    if not isinstance(group, Tensor) or group.dtype != torch.int64 or group.shape != (k,) or group.device != x.device:
        kind = f"{group.dtype} {list(group.shape)} on {group.device}" if isinstance(group, Tensor) else group
        raise ValueError(f"with groups > 1 group must be int64 [{k}] on {x.device}, a group of each neuron, got {kind}")
    return x.unflatten(1, (groups, -1)).index_select(1, group).flatten(1, 2)


# The cross-overs that bench/bench_row_gradient.py --crossover measured. Nothing is timed when they are used, so runs
# repeat. A processor that was not measured, as yet every GPU, has no part in the table and gets the library's call.

_TABLE = json.loads((Path(__file__).parent / "row_gradient.json").read_text())


def geometry_name(kernel: Sequence[int], stride: Sequence[int], transposed: bool, last: bool = False) -> str:
    """What a geometry is called in the table: "3x3 stride 2 transposed"; "linear" without a kernel. last: the channels
    of x are side by side."""
    if not kernel:
        return "linear"
    return f"{'x'.join(map(str, kernel))} stride {max(stride)}{' transposed' * transposed}{', channels last' * last}"


def rows_of_own_kernel(processor: str, name: str, channels: int, positions: int) -> int:
    """Up to how many rows our kernel is faster than the library, by the nearest case that was measured; 0 without."""
    cases = _TABLE["own"].get(processor, {}).get(name, [])

    def distance(case):
        return abs(math.log(case["channels"] / channels)) + abs(math.log(case["positions"] / positions))

    return min(cases, key=distance)["rows"] if cases else 0


def dense_is_faster(
    k: int, n: int, x: Tensor, kernel: Sequence[int] = (), stride: int | Sequence[int] = 1, transposed: bool = False
) -> bool:
    """Whether the weight gradient of all n neurons and then its k rows is faster than that of k gathered ones.

    By the table of measured cross-overs for x's device and the layer's geometry. Where none was measured gathering is
    taken to be faster for any k < n; k = n needs no gathering.
    """
    name = geometry_name(kernel, [stride] if isinstance(stride, int) else stride, transposed)
    return k >= n * _TABLE["dense"].get(x.device.type, {}).get(name, 1.0)


def _channels_last(x: Tensor, groups: int) -> bool:
    """Whether x is one for the kernel whose lanes are channels: with fewer than 16 some would be empty."""
    return groups == 1 and x.shape[1] >= 16 and x.stride(1) == 1 and not x.is_contiguous()


def _library_is_faster(processor: str, x: Tensor, k: int, kernel, stride, transposed: bool, groups: int) -> bool:
    """By the cross-over table. Only two layouts of x and a single group were measured, so all else is the library's."""
    last = _channels_last(x, groups)
    if groups > 1 or not (last or x.is_contiguous()):
        return True
    name = geometry_name(kernel, stride, transposed, last)
    return k > rows_of_own_kernel(processor, name, x.shape[1], math.prod(x.shape[2:]))


# Launchers. Shapes, dtypes and devices were checked by row_gradient.


def _in_three_dimensions(x, gy, kernel, stride, padding, dilation):
    """For each of the three axes, ones in front: S, P, kernel, ..."""
    fills = ((1, x.shape[2:]), (1, gy.shape[2:]), (1, kernel), (1, stride), (0, padding), (1, dilation))
    return [[fill] * (3 - len(kernel)) + list(values) for fill, values in fills]


@row_gradient_convolution.register("cpp", dtypes=(torch.float32,))
def _(native, x, gy, kernel, stride, padding, dilation, transposed, groups, choose, rows=None):
    args = kernel, stride, padding, dilation, transposed, groups
    processor = f"cpu {('baseline', 'avx2', 'avx512')[native.cpu_isa()]}"
    k = gy.shape[1] if rows is None else rows.shape[0]
    empty = x.numel() == 0 or gy.numel() == 0 or k == 0
    if empty or (choose and _library_is_faster(processor, x, k, kernel, stride, transposed, groups)):
        return row_gradient_convolution.reference(x, gy, *args, choose, rows)
    dW = x.new_empty(_weight_shape(x, k, kernel, groups))
    axes = _in_three_dimensions(x, gy, kernel, stride, padding, dilation)
    threads = torch.get_num_threads()
    if _channels_last(x, groups):
        counts = [x.shape[0], x.shape[1], k, gy.shape[1]]
        none = [0] * (3 - len(kernel))
        strides = [x.stride(0), *none, *x.stride()[2:]], [*gy.stride()[:2], *none, *gy.stride()[2:]]
        rows = rows if rows is None else rows.contiguous()
        addresses = x.data_ptr(), gy.data_ptr(), 0 if rows is None else rows.data_ptr(), dW.data_ptr()
        native.row_gradient_last_cpu(*addresses, counts, axes, *strides, transposed, threads)
        return dW
    x, gy = x.flatten(2), _gathered(gy, rows).contiguous()
    x = x if x.stride(2) == 1 else x.contiguous()
    counts = [x.shape[0], dW.shape[1], k, groups, x.stride(0), x.stride(1)]
    native.row_gradient_cpu(x.data_ptr(), gy.data_ptr(), dW.data_ptr(), counts, axes, transposed, threads)
    return dW


@row_gradient_convolution.register("triton", dtypes=(torch.float32, torch.bfloat16, torch.float16))
def _(kernels, x, gy, kernel, stride, padding, dilation, transposed, groups, choose, rows=None):
    args = kernel, stride, padding, dilation, transposed, groups
    gy = _gathered(gy, rows)
    processor = torch.cuda.get_device_name(x.device) if x.is_cuda else "interpreter"
    empty = x.numel() == 0 or gy.numel() == 0
    if empty or (choose and _library_is_faster(processor, x, gy.shape[1], kernel, stride, transposed, groups)):
        return row_gradient_convolution.reference(x, gy, *args, choose)
    shape = _weight_shape(x, gy.shape[1], kernel, groups)
    axes = _in_three_dimensions(x, gy, kernel, stride, padding, dilation)
    x, gy = x.flatten(2), gy.contiguous()
    parts = zip(x.chunk(groups, 1), gy.chunk(groups, 1), strict=True) if groups > 1 else [(x, gy)]
    return torch.cat([kernels.row_gradient(one, two.contiguous(), *axes, transposed) for one, two in parts]).view(shape)
