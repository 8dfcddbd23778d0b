"""Minibatch standard deviation (Karras et al. 2017, section 3; 2020, StyleGAN2's discriminator), concatenated to x.

With G samples in a group, sample i in group m = i mod B / G, K = C / F H W elements in feature f, and per element the
mean u and s = sqrt(sum over the group of (x - u)² / G + 1e-8):

    forward        y    = [x, S[m, f] in every pixel],           S[m, f] = sum over the feature's elements of s / K
    backward       dx   = dy[:, :C] + D (x - u) / (K G s),       D[m, f] = sum over samples, pixels of dy[:, C + f]
    second order   ddy  = [ddx, T[m, f] in every pixel],         T[m, f] = sum over the elements of A / (K G s)
                   gx   = D / (K G s) (ddx - v - A (x - u) / (G s²))
                   A    = sum over the group of (x - u) ddx,     v = mean over the group of ddx

gx is the gradient of <dx, ddx> with respect to x. x, dx, ddx, gx are [B, C, H, W], y, dy, ddy are [B, C + F, H, W].
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_unary

from ._op import DTYPE_CODES, Op, forced_backend, memory_format, refuse_transforms, run, wide_dtype
from .checks import check_tensor

_EPS = 1e-8


@Op
def minibatch_stddev_forward(x: Tensor, size: int, features: int) -> Tensor:
    """`size` samples a group, a divisor of B; x is contiguous or channels-last, and so are all results."""
    *_, s = _deviation(x, size, features)
    return _append(x, s.mean((0, 3, 4, 5)), size)


@Op
def minibatch_stddev_backward(dy: Tensor, x: Tensor, size: int, features: int) -> Tensor:
    difference, s = _deviation(x, size, features)
    K = math.prod(difference.shape[3:])
    share = _per_group(_sums(dy, x, size)) * difference / (K * size * s)
    return _like(x, dy[:, : x.shape[1]] + share.reshape(x.shape))


@Op
def minibatch_stddev_double_backward(
    ddx: Tensor, dy: Tensor, x: Tensor, size: int, features: int
) -> tuple[Tensor, Tensor]:
    """ddy and gx."""
    difference, s = _deviation(x, size, features)
    K = math.prod(difference.shape[3:])
    v = _grouped(ddx, size, features)
    A = (difference * v).sum(0, keepdim=True)
    T = (A / (s * size)).mean((0, 3, 4, 5))
    gx = (
        _per_group(_sums(dy, x, size)) / (K * size * s) * (v - v.mean(0, keepdim=True) - A * difference / (size * s**2))
    )
    return _append(ddx, T, size), _like(x, gx.reshape(x.shape))


def _grouped(x: Tensor, size: int, features: int) -> Tensor:
    """[G, M, F, C / F, H, W] in the type that sums are in."""
    B, C, H, W = x.shape
    x = x.to(wide_dtype(x.dtype))
    return x.reshape(size, B // size, features, C // features, H, W)


def _deviation(x: Tensor, size: int, features: int) -> tuple[Tensor, Tensor]:
    """x - u and, [1, M, F, C / F, H, W], s."""
    y = _grouped(x, size, features)
    difference = y - y.mean(0, keepdim=True)
    return difference, (difference.square().mean(0, keepdim=True) + _EPS).sqrt()


def _sums(dy: Tensor, x: Tensor, size: int) -> Tensor:
    """D [M, F] in the type that sums are in."""
    wide = wide_dtype(x.dtype)
    return dy[:, x.shape[1] :].unflatten(0, (size, x.shape[0] // size)).sum((0, 3, 4), dtype=wide)


def _per_group(values: Tensor) -> Tensor:
    return values[None, :, :, None, None, None]


def _append(x: Tensor, S: Tensor, size: int) -> Tensor:
    """[x, S in every pixel], laid out as x."""
    channels = S.to(x.dtype).repeat(size, 1)[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return _like(x, torch.cat((x, channels), 1))


def _like(x: Tensor, result: Tensor) -> Tensor:
    return _empty(x, result.shape[1]).copy_(result)


def _empty(x: Tensor, channels: int) -> Tensor:
    size = x.shape[0], channels, *x.shape[2:]
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    return other.contiguous(memory_format=memory_format(x))


class _MinibatchStddev(Function):
    @staticmethod
    def forward(ctx, x, *args):
        ctx.save_for_backward(x)
        ctx.args = args
        size, features, backend = args
        return minibatch_stddev_forward(x, size, features, backend=backend)

    @staticmethod
    def backward(ctx, dy):
        refuse_transforms("minibatch_stddev", dy)
        (x,) = ctx.saved_tensors
        return run(_MinibatchStddevBackward, _laid_out_as(x, dy), x, *ctx.args), None, None, None


class _MinibatchStddevBackward(Function):
    @staticmethod
    def forward(ctx, dy, x, *args):
        ctx.save_for_backward(dy, x)
        ctx.args = args
        size, features, backend = args
        return minibatch_stddev_backward(dy, x, size, features, backend=backend)

    @staticmethod
    def backward(ctx, ddx):
        dy, x = ctx.saved_tensors
        ddy, gx = run(_MinibatchStddevDoubleBackward, _laid_out_as(x, ddx), dy, x, *ctx.args)
        return ddy, gx, None, None, None


class _MinibatchStddevDoubleBackward(Function):
    """Its own backward is PyTorch's, through the reference."""

    @staticmethod
    def forward(ctx, ddx, dy, x, *args):
        ctx.save_for_backward(ddx, dy, x)
        size, features, backend = ctx.args = args
        return minibatch_stddev_double_backward(ddx, dy, x, size, features, backend=backend)

    @staticmethod
    def backward(ctx, *cotangents):
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, because dy may depend on x, and the gradient by x through dy is not asked for here.
            tensors = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors]
            results = minibatch_stddev_double_backward.reference(*tensors, *ctx.args[:2])
            gradients = torch.autograd.grad(results, tensors, cotangents, create_graph=again)
        return *gradients, None, None, None


def minibatch_stddev(x: Tensor, group: int | None = 4, features: int = 1) -> Tensor:
    """Appends `features` channels to x: the mean standard deviation over groups of samples, the same in every pixel.

    Sample i is in group i mod (B / G). The first new channel is the mean over the first C / features channels, and so
    on. Differentiable any number of times.

    Args:
        x: [B, C, H, W]; float32, float64, bfloat16 or float16. Contiguous and channels-last ones are read as they are,
            and the result has their layout; any other is copied to a contiguous one first.
        group: samples a group, at least 1; where it does not divide B, G is the largest divisor of B below it. None is
            the whole batch, as in Progressive GAN and StyleGAN.
        features: channels to append, a divisor of C.

    Returns:
        [B, C + features, H, W] of x's dtype. Statistics are in float32 (float64 for float64), in a fixed order.

    Raises:
        TypeError, ValueError: an argument is not as said above; the message names it.
        RuntimeError: a backend is forced (`use_backend`, MINEGAN_BACKEND) that is missing here or takes no such tensor.
        NotImplementedError: inside a transform of torch.func, vmap, grad or jacrev say.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(minibatch_stddev, (x,), x, group=group, features=features)
    check_tensor(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x must have shape [B, C, H, W], got {list(x.shape)}")
    B, C = x.shape[:2]
    if group is not None and not (isinstance(group, int) and group >= 1):
        raise ValueError(f"group must be an integer >= 1, or None for the whole batch, got {group!r}")
    if not (isinstance(features, int) and features >= 1 and C >= 1 and C % features == 0):
        raise ValueError(f"features must be a divisor of x's {C} channels, got {features!r}")
    most = max(B if group is None else min(group, B), 1)
    size = next(g for g in range(most, 0, -1) if B % g == 0)
    refuse_transforms("minibatch_stddev")
    # x is laid out here, because a copy made within the Function would lack the history that higher orders need.
    return run(_MinibatchStddev, _laid_out_as(x, x), size, features, forced_backend())


# Launchers. All tensors are dense and laid out as x: the Functions saw to it.


def _shape(x: Tensor, size: int, features: int) -> tuple[int, ...]:
    """G, M, C, pixels, F, and whether channels come last."""
    B, C, H, W = x.shape
    return size, B // size, C, H * W, features, memory_format(x) == torch.channels_last


@minibatch_stddev_forward.register("cpp")
def _(native, x, size, features):
    y = _empty(x, x.shape[1] + features)
    addresses = x.data_ptr(), y.data_ptr()
    native.minibatch_stddev_cpu(DTYPE_CODES[x.dtype], *addresses, *_shape(x, size, features), torch.get_num_threads())
    return y


@minibatch_stddev_backward.register("cpp")
def _(native, dy, x, size, features):
    dx, D = torch.empty_like(x), _sums(dy, x, size)
    addresses = dy.data_ptr(), D.data_ptr(), x.data_ptr(), dx.data_ptr()
    native.minibatch_stddev_backward_cpu(
        DTYPE_CODES[x.dtype], *addresses, *_shape(x, size, features), torch.get_num_threads()
    )
    return dx


@minibatch_stddev_double_backward.register("cpp")
def _(native, ddx, dy, x, size, features):
    ddy, gx, D = torch.empty_like(dy), torch.empty_like(x), _sums(dy, x, size)
    addresses = ddx.data_ptr(), D.data_ptr(), x.data_ptr(), ddy.data_ptr(), gx.data_ptr()
    native.minibatch_stddev_double_backward_cpu(
        DTYPE_CODES[x.dtype], *addresses, *_shape(x, size, features), torch.get_num_threads()
    )
    return ddy, gx


@minibatch_stddev_forward.register("triton")
def _(kernels, x, size, features):
    y = _empty(x, x.shape[1] + features)
    kernels.minibatch_stddev(x, y, *_shape(x, size, features))
    return y


@minibatch_stddev_backward.register("triton")
def _(kernels, dy, x, size, features):
    dx = torch.empty_like(x)
    kernels.minibatch_stddev_backward(dy, _sums(dy, x, size), x, dx, *_shape(x, size, features))
    return dx


@minibatch_stddev_double_backward.register("triton")
def _(kernels, ddx, dy, x, size, features):
    ddy, gx = torch.empty_like(dy), torch.empty_like(x)
    kernels.minibatch_stddev_double_backward(ddx, _sums(dy, x, size), x, ddy, gx, *_shape(x, size, features))
    return ddy, gx
