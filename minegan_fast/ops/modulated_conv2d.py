"""The modulated convolution of StyleGAN2 (Karras et al. 2020, eq. 1-3): one convolution for the whole batch.

    y_bo = d_bo sum_i W_oi * (s_bi x_bi),      d_bo = 1 / sqrt( sum_i s_bi^2 sum_k W_oik^2 + eps )

Scaling activations on both sides of the convolution W needs no weights of a sample's own; sum_k W^2 is the batch's as
well. The convolution is PyTorch's, so that whatever watches a weight sees it used; the passes around it are ours:

    modulation     xs  = s x
    its backward   gx  = s gy,               gs = sum over positions of gy x
    second order   dgy = s hx + hs x,        dx = hs gy,       ds = sum over positions of hx gy
    epilogue       y   = act(d c + strength noise + bias) gain                               (noise_bias_act)

The convolution keeps x and s for its weight gradient, not xs. With gy the gradient at its output, dW is that of one
plain convolution, plus what comes through d: dW = wgrad(s x, d gy) - W_oik sum_b s_bi^2 d_bo^3 gd_bo.
x [B, I, H, W], s [B, I], W [O, I, k, k], d [B, O], y [B, O, H', W'].
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .._torch import is_tracing, version_of
from ._op import DTYPE_CODES, Op, forced_backend, refuse_transforms, run, wide_dtype
from .bias_act import _dense, _laid_out_like
from .checks import check_beside, check_tensor
from .demodulation import demodulation
from .noise_bias_act import addresses, check_act, noise_bias_act, planes
from .transposed_conv2d import transposed_conv2d
from .upfirdn2d import upfirdn2d


@Op
def modulate_forward(x: Tensor, s: Tensor) -> Tensor:
    return (x.to(s.dtype) * s[:, :, None, None]).to(x.dtype)


@Op
def modulate_backward(gy: Tensor, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    g = gy.to(s.dtype)
    return (g * s[:, :, None, None]).to(gy.dtype), (g * x.to(s.dtype)).sum((2, 3))


@Op
def modulate_double_backward(hx: Tensor, gy: Tensor, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k [2, B, C]: s, hs."""
    s, hs = k[..., None, None]
    h, g = hx.to(k.dtype), gy.to(k.dtype)
    dgy = s * h + hs * x.to(k.dtype)
    return dgy.to(x.dtype), (hs * g).to(x.dtype), (h * g).sum((2, 3))


class _Modulate(Function):
    @staticmethod
    def forward(ctx, x, s, backend):
        ctx.backend = backend
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, s)
        return modulate_forward(x, s, backend=backend)

    @staticmethod
    def backward(ctx, gy):
        refuse_transforms("modulated_conv2d", gy)
        x, s = ctx.saved_tensors
        if x is None:
            return run(_Modulate, _dense(gy), s, ctx.backend), None, None
        return *run(_Backward, _laid_out_like(x, gy), x, s, ctx.backend), None


class _Backward(Function):
    @staticmethod
    def forward(ctx, gy, x, s, backend):
        ctx.backend = backend
        ctx.save_for_backward(gy, x, s)
        return modulate_backward(gy, x, s, backend=backend)

    @staticmethod
    def backward(ctx, hx, hs):
        gy, x, s = ctx.saved_tensors
        k = torch.stack((s, hs))
        if torch.is_grad_enabled():  # a third order: the reference is differentiable as it stands
            return *modulate_double_backward.reference(hx, gy, x, k), None
        return *modulate_double_backward(_laid_out_like(x, hx), gy, x, k, backend=ctx.backend), None


def _keeping_factors(x: Tensor, s: Tensor, xs: Tensor):
    """A context in which autograd does not save xs = s x. A backward that needs xs computes it again of x and s.

    `_Modulate` keeps x and s anyway. xs itself would be one more copy of the activations in each layer.
    """
    if torch.compiler.is_compiling() or type(xs) is not Tensor or not torch.is_grad_enabled():
        return nullcontext()
    x, s, backend, version = x.detach(), s.detach(), forced_backend(), version_of(x)
    address, shape = xs.data_ptr(), xs.shape

    def pack(tensor):
        if type(tensor) is Tensor and tensor.data_ptr() == address and tensor.shape == shape:
            return None
        return tensor

    def unpack(packed):
        if packed is not None:
            return packed
        if version_of(x) != version:
            raise RuntimeError("modulated_conv2d: x was changed by an in-place operation, and its backward needs it")
        return modulate_forward(x, s, backend=backend)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class ModulatedWeight:
    """What the op asks of its weight [O, I, k, k], or [1, O, I, k, k]."""

    def __init__(self, weight: Tensor):
        self.weight = weight.flatten(0, 1) if weight.dim() == 5 and len(weight) == 1 else weight

    def demodulation(self, s: Tensor, eps: float) -> Tensor:
        """s [B, I] -> d [B, O], in its dtype."""
        if not torch.compiler.is_compiling() and not has_torch_function_variadic(s, self.weight):
            return demodulation(s, self.weight, None, None, eps)
        # Whoever watches the weight, or compiles, sees functions of torch.
        w = self.weight if self.weight.dtype == s.dtype else self.weight.to(s.dtype)
        return torch.rsqrt(F.linear(s.square(), w.square().sum((2, 3))) + eps)

    def convolve(self, x: Tensor, stride: int, padding: int, transposed: bool) -> Tensor:
        w = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        if transposed:
            return transposed_conv2d(x, w.transpose(0, 1))
        return F.conv2d(x, w, stride=stride, padding=padding)


own_weights: dict[type, Callable[[Tensor], ModulatedWeight | None]] = {}
"""By the class of a weight, what answers in its place: a weight whose rows train is asked once, not at every step."""


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    *,
    demodulate: bool = True,
    up: bool = False,
    down: bool = False,
    kernel: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-8,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "linear",
    alpha: float = 0.2,
    gain: float = 1.0,
) -> Tensor:
    """A convolution whose input channels are scaled by a style, and the rest of its layer, differentiable to any order.

    Args:
        x: [B, I, H, W], contiguous or channels-last, which the result then is too; float32, float64, bfloat16 or
            float16. Under autocast it is converted to autocast's dtype, unless it is float64.
        weight: [O, I, k, k], k odd, or [1, O, I, k, k] as StyleGAN2 keeps it; of any floating dtype.
        style: [B, I], of any floating dtype; s = scale style is computed in float32, for a float64 x in float64.
        demodulate: divide each output by the expected norm d, eq. 3, whose sum is taken in s's dtype.
        up: twice the size: a transposed convolution of stride 2, then the filter `kernel`.
        down: half the size: the filter `kernel`, then a convolution of stride 2.
        kernel: as of `upfirdn2d`, [n, n] or [n] with n >= 2; needed with `up` (of sum 4, or 2 along each axis, to keep
            the mean) and with `down` (of sum 1), and with them alone.
        scale: factor on the style, or, which is the same, on the weight: equalised learning rate.
        eps: of the demodulation.
        noise, strength, bias, act, alpha, gain: as of `noise_bias_act`, which is applied to the result.

    Returns:
        [B, O, H, W], or [B, O, 2H, 2W] with `up`, or [B, O, H // 2, W // 2] with `down`; of x's (or
        autocast's) dtype.

    Raises:
        TypeError, ValueError: an argument is not as said above; the message names it.
        RuntimeError: a backend is forced (`use_backend`, MINEGAN_BACKEND) that is missing here or takes no such tensor.
        NotImplementedError: inside a transform of torch.func, vmap, grad or jacrev say.
    """
    # Of other tensors, such as a held weight, the functions of torch below ask the subclass themselves.
    if has_torch_function_variadic(x, style):
        options = {"demodulate": demodulate, "up": up, "down": down, "kernel": kernel, "scale": scale, "eps": eps}
        options |= {"noise": noise, "strength": strength, "bias": bias, "act": act, "alpha": alpha, "gain": gain}
        return handle_torch_function(modulated_conv2d, (x, style), x, weight, style, **options)
    check_act(x, None, None, None, None, act, alpha, gain, "x")
    own = None if is_tracing() or torch.compiler.is_compiling() else own_weights.get(type(weight))
    w = None if own is None else own(weight)
    if w is None:
        check_tensor(weight, "weight")
        w = ModulatedWeight(weight)
    for name, tensor in (("weight", w.weight), ("style", style)):
        check_beside(tensor, name, x, "x")
    shape = w.weight.shape
    if len(shape) != 4 or shape[1] != x.shape[1] or shape[2] != shape[3]:
        raise ValueError(f"weight must have shape [O, {x.shape[1]}, k, k], got {list(shape)}")
    if shape[2] % 2 == 0:
        raise ValueError(f"weight must have an odd kernel size, got {shape[2]}")
    if style.shape != x.shape[:2]:
        raise ValueError(f"style must have shape {list(x.shape[:2])}, as x's first axes are, got {list(style.shape)}")
    if up and down:
        raise ValueError("up and down exclude each other")
    if (kernel is not None) != (up or down):
        raise ValueError("kernel, the filter, goes with up or down: give it with one of them, and only then")
    if kernel is not None and (
        kernel.dim() not in (1, 2) or kernel.shape[0] != kernel.shape[-1] or kernel.shape[0] < 2
    ):
        raise ValueError(f"kernel must have shape [n, n] or [n] with n >= 2, got {list(kernel.shape)}")

    refuse_transforms("modulated_conv2d")
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    size, n = shape[2], 0 if kernel is None else kernel.shape[0]
    with torch.autocast(kind, enabled=False):
        s = (style.to(wide_dtype(x.dtype)) * scale).contiguous()
        d = None
        if demodulate:  # Squares overflow float16, and bfloat16 has too few digits for their sum.
            d = w.demodulation(s, eps)
        if down and kernel is not None:
            before, after = (n + size - 2) // 2, (n + size - 3) // 2
            x = upfirdn2d(x, kernel, padding=(before, after, before, after))
        x = _dense(x)
        xs = run(_Modulate, x, s, forced_backend())
        with _keeping_factors(x, s, xs):
            y = w.convolve(xs, 2 if up or down else 1, 0 if up or down else size // 2, up)
        if up and kernel is not None:
            before, after = (n - size) // 2 + 1, (n - size - 1) // 2 + 1
            y = upfirdn2d(y, kernel, padding=(before, after, before, after))
        return noise_bias_act(y, d, noise, strength, bias, act=act, alpha=alpha, gain=gain)


# Launchers. All images are dense and laid out alike, s and k contiguous.


@modulate_forward.register("cpp")
def _(native, x, s):
    y = torch.empty_like(x)
    pointers, threads = addresses(x, s, y), torch.get_num_threads()
    native.modulated_conv2d_modulate_cpu(DTYPE_CODES[x.dtype], *pointers, planes(x), threads)
    return y


@modulate_backward.register("cpp")
def _(native, gy, x, s):
    gx, gs = torch.empty_like(gy), torch.empty_like(s)
    pointers, threads = addresses(gy, x, s, gx, gs), torch.get_num_threads()
    native.modulated_conv2d_backward_cpu(DTYPE_CODES[x.dtype], *pointers, planes(x), threads)
    return gx, gs


@modulate_double_backward.register("cpp")
def _(native, hx, gy, x, k):
    dgy, dx, ds = torch.empty_like(x), torch.empty_like(x), torch.empty_like(k[0])
    pointers, threads = addresses(hx, gy, x, k, dgy, dx, ds), torch.get_num_threads()
    native.modulated_conv2d_double_backward_cpu(DTYPE_CODES[x.dtype], *pointers, planes(x), threads)
    return dgy, dx, ds


@modulate_forward.register("triton")
def _(kernels, x, s):
    return kernels.modulate(x, s)


@modulate_backward.register("triton")
def _(kernels, gy, x, s):
    return kernels.modulate_backward(gy, x, s)


@modulate_double_backward.register("triton")
def _(kernels, hx, gy, x, k):
    return kernels.modulate_double_backward(hx, gy, x, k)
