"""The transposed convolution of stride 2, as four plain convolutions where those are faster.

Every second output along an axis sees every second tap alone: with y[2 i + a] = sum over j of W[a + 2 j] x[i - j], the
outputs of one parity are a plain convolution of x with the taps of that parity. On a CPU the library's own transposed
convolution is slow, in bfloat16 by several times; its gradients, a convolution of stride 2 and a weight gradient, are
not. With T(x, W) the layer and C(gy, W) the convolution of stride 2, its input gradient:

    forward        y  = T(x, W)
    backward       gx = C(gy, W),    gW = row_gradient(x, gy)
    second order   dgy = T(hx, W),   dW = row_gradient(hx, gy)        for a cotangent hx of gx, and so on to any order

x [B, I, H, W], W [I, O, kh, kw], y [B, O, 2 (H - 1) + kh, 2 (W - 1) + kw].
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from .._torch import transforms_active
from ._op import backward_wants, refuse_transforms, use_backend
from .row_gradient import row_gradient

_SPLIT_ON = {"cpu"}  # where the library's own is slow


def transposed_forward(x: Tensor, weight: Tensor) -> Tensor:
    """T(x, W), without a graph."""
    kernel = weight.shape[2:]
    if x.device.type not in _SPLIT_ON or min(kernel) < 2 or x.numel() == 0:
        return F.conv_transpose2d(x, weight, stride=2)
    size = [2 * (s - 1) + k for s, k in zip(x.shape[2:], kernel, strict=True)]
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(x.shape[0], weight.shape[1], *size, dtype=x.dtype, device=x.device, memory_format=layout)
    weight = weight.transpose(0, 1)
    for a in (0, 1):
        for b in (0, 1):
            taps = weight[:, :, a::2, b::2].flip(2, 3)
            y[:, :, a::2, b::2] = F.conv2d(x, taps, padding=[k - 1 for k in taps.shape[2:]])
    return y


class _Transposed(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return transposed_forward(x, weight)

    @staticmethod
    def backward(ctx, gy):
        # A batched gradient goes through a Function once, but its graph does not.
        refuse_transforms("transposed_conv2d", gy if torch.is_grad_enabled() else None)
        x, weight = ctx.saved_tensors
        gx = _Strided.apply(gy, weight) if backward_wants(ctx, 0) else None
        return gx, _weight_gradient(x, gy, weight) if backward_wants(ctx, 1) else None


class _Strided(Function):
    @staticmethod
    def forward(ctx, gy, weight):
        ctx.save_for_backward(gy if ctx.needs_input_grad[1] else None, weight)
        return F.conv2d(gy, weight, stride=2)

    @staticmethod
    def backward(ctx, hx):
        gy, weight = ctx.saved_tensors
        dgy = _Transposed.apply(hx, weight) if backward_wants(ctx, 0) else None
        return dgy, _weight_gradient(hx, gy, weight) if backward_wants(ctx, 1) else None


def _weight_gradient(x: Tensor, gy: Tensor, weight: Tensor) -> Tensor:
    with use_backend("reference"):  # the library's, which is the best for all rows
        return row_gradient(x, gy, tuple(weight.shape[2:]), 2, transposed=True).transpose(0, 1)


def transposed_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """conv_transpose2d(x, weight, stride=2) for x [B, I, H, W], weight [I, O, kh, kw] of one dtype; differentiable to
    any order. Weights that are no plain tensors, compilers and transforms get PyTorch's own function."""
    others = torch.compiler.is_compiling() or transforms_active() or has_torch_function_variadic(x, weight)
    if others or type(x) is not Tensor:
        return F.conv_transpose2d(x, weight, stride=2)
    return _Transposed.apply(x, weight)
