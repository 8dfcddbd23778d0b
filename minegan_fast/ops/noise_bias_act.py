"""What follows the convolution of a styled layer in StyleGAN2 (Karras et al. 2020), in one pass.

For every sample b and channel o a demodulation coefficient d, a noise strength f and a bias h; n is the noise of a
position, u = d c + f n + h, and m = gain where u > 0, else slope gain:

    forward        y   = m u
    backward       gc  = m d gy,   gd = sum of m gy c,   gf = sum of m gy n,   gh = sum of m gy        over positions
    second order   with e = hd / d and cotangents hc, hd, hf, hh of the above
                   dgy = m (d hc + e y / m + (hf - e f) n + hh - e h),   dy = e gy,
                   dd  = sum of m gy hc - e gd,   df = -e gf,   dh = -e gh

As slope and gain are above 0, y gives u back, and c = (y / m - f n - h) / d: y is saved, and c is free to go. The
second order therefore has a gradient by y, which autograd sends through the forward's backward once more.
c, y, gy, gc are [B, C, H, W]; d, f, h and their gradients [B, C]; n is [B or 1, 1, H, W]. In the code f is
[B or 1, 1], h [B or 1, C], and d, h, and n with f may be None.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._op import DTYPE_CODES, Op, forced_backend, refuse_transforms, run, wide_dtype
from .bias_act import _dense, _laid_out_like
from .checks import check_beside, check_factor, check_tensor


def _each(k: Tensor) -> Tensor:
    return k[..., None, None]


def _factor(y: Tensor, slope: float, gain: float) -> Tensor:
    kind = wide_dtype(y.dtype)
    above, below = (torch.scalar_tensor(v, dtype=kind, device=y.device) for v in (gain, slope * gain))
    return torch.where(y > 0, above, below)


@Op
def noise_bias_act_forward(
    c: Tensor, n: Tensor | None, d: Tensor | None, f: Tensor | None, h: Tensor | None, slope: float, gain: float
) -> Tensor:
    u = c.to(wide_dtype(c.dtype))
    u = u if d is None else u * _each(d)
    u = u if h is None else u + _each(h)
    u = u if n is None or f is None else u + _each(f) * n
    return (torch.where(u > 0, u, u * slope) * gain).to(c.dtype)


@Op
def noise_bias_act_backward(
    gy: Tensor,
    y: Tensor,
    n: Tensor | None,
    d: Tensor | None,
    f: Tensor | None,
    h: Tensor | None,
    slope: float,
    gain: float,
) -> tuple[Tensor, Tensor]:
    """gc and, [3, B, C], gd, gf, gh."""
    m = _factor(y, slope, gain)
    g = gy.to(m.dtype) * m
    sums = [g.sum((2, 3))]
    sums.insert(0, torch.zeros_like(sums[0]) if n is None else (g * n).sum((2, 3)))
    if d is None:
        return g.to(gy.dtype), torch.stack([torch.zeros_like(sums[0]), *sums])
    t = y.to(m.dtype) / m
    t = t if h is None else t - _each(h)
    t = t if n is None or f is None else t - _each(f) * n
    return (g * _each(d)).to(gy.dtype), torch.stack([(g * t).sum((2, 3)) / d, *sums])


@Op
def noise_bias_act_double_backward(
    hc: Tensor, gy: Tensor, y: Tensor, n: Tensor | None, k: Tensor, slope: float, gain: float
) -> tuple[Tensor, Tensor, Tensor]:
    """m (d hc + e y / m + f n + h), e gy, and the sum of m gy hc; k [4, B, C] holds d, e, f and h."""
    d, e, f, h = _each(k)
    m = _factor(y, slope, gain)
    hc, g = hc.to(k.dtype), gy.to(k.dtype)
    u = d * hc + e * (y.to(k.dtype) / m) + h
    u = u if n is None else u + f * n
    return (m * u).to(y.dtype), (e * g).to(y.dtype), (m * g * hc).sum((2, 3))


class _NoiseBiasAct(Function):
    @staticmethod
    def forward(ctx, c, n, d, f, h, slope, gain, backend):
        y = noise_bias_act_forward(_dense(c), n, d, f, h, slope, gain, backend=backend)
        ctx.args = (slope, gain, backend)
        ctx.save_for_backward(y, n, d, f, h)
        return y

    @staticmethod
    def backward(ctx, gy):
        refuse_transforms("noise_bias_act", gy)
        y, n, d, f, h = ctx.saved_tensors
        gc, gd, gf, gh = run(_Backward, _laid_out_like(y, gy), y, n, d, f, h, *ctx.args)
        return gc, None, gd, gf, gh, None, None, None


class _Backward(Function):
    @staticmethod
    def forward(ctx, gy, y, n, d, f, h, slope, gain, backend):
        ctx.set_materialize_grads(False)
        gc, ctx.sums = noise_bias_act_backward(gy, y, n, d, f, h, slope, gain, backend=backend)
        ctx.args = (slope, gain, backend)
        ctx.save_for_backward(gy, y, n, d, f, h)
        return gc, *_reduced(ctx.sums, d, f, h, recorded=any(ctx.needs_input_grad))

    @staticmethod
    def backward(ctx, hc, hd, hf, hh):
        gy, y, n, d, f, h = ctx.saved_tensors
        slope, gain, backend = ctx.args
        sums, given = ctx.sums, (d, f, h)
        hc = torch.zeros_like(y) if hc is None else hc
        zeros, ones = torch.zeros_like(sums[0]), torch.ones_like(sums[0])
        d, f, h = (zero if k is None else k for k, zero in ((d, ones), (f, zeros), (h, zeros)))
        hd, hf, hh = (zeros if k is None else k for k in (hd, hf, hh))
        e = hd / d
        k = torch.stack(torch.broadcast_tensors(d, e, hf - e * f, hh - e * h))
        if torch.is_grad_enabled():  # a third order: the references are differentiable as they stand
            dgy, dy, dd = noise_bias_act_double_backward.reference(hc, gy, y, n, k, slope, gain)
            _, sums = noise_bias_act_backward.reference(gy, y, n, d, f, h, slope, gain)
        else:
            hc = _laid_out_like(y, hc)
            dgy, dy, dd = noise_bias_act_double_backward(hc, gy, y, n, k, slope, gain, backend=backend)
        gd, gf, gh = sums
        return dgy, dy, None, *_reduced((dd - e * gd, -e * gf, -e * gh), *given), None, None, None


def _reduced(sums: Tensor | tuple, d: Tensor | None, f: Tensor | None, h: Tensor | None, recorded=False) -> list:
    """Gradients [B, C] of d, f and h, added up to the shapes of those that there are.

    recorded: a Function returns them, whose results nobody may write into if they are parts of one tensor.
    """
    return [None if k is None else s.clone() if recorded and k.shape == s.shape else s.sum_to_size(k.shape)
            for s, k in zip(sums, (d, f, h), strict=True)]  # fmt: skip


def noise_bias_act(
    c: Tensor,
    d: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    act: str = "linear",
    alpha: float = 0.2,
    gain: float = 1.0,
) -> Tensor:
    """act(d c + strength noise + bias) * gain in one pass, differentiable any number of times.

    Args:
        c: [B, C, H, W]; float32, float64, bfloat16 or float16. Contiguous and channels-last ones are read as they are,
            and the result has their layout.
        d: [B, C] factors, none of them 0: the demodulation coefficients; None for none.
        noise: [B or 1, 1, H, W]; None for none.
        strength: one element, the factor of the noise, or [B, 1], one a sample; given exactly where noise is.
        bias: [C], or [B, C]; None for none.
        act: "linear" or "lrelu" (leaky relu).
        alpha: slope of "lrelu" below zero, finite and > 0: the layer is computed backwards from its result.
        gain: factor on the result, finite and > 0.

    The small tensors may have any floating dtype and are read in float32, for a float64 c in float64.

    Returns:
        A tensor of c's shape, dtype and layout (c itself where there is nothing to compute). Gradients are summed in a
        fixed order.

    Raises:
        TypeError, ValueError: an argument is not as said above; the message names it.
        RuntimeError: a backend is forced (`use_backend`, MINEGAN_BACKEND) that is missing here or takes no such tensor.
        NotImplementedError: inside a transform of torch.func, vmap, grad or jacrev say.
    """
    small = (d, noise, strength, bias)
    if has_torch_function_variadic(c, *small):
        return handle_torch_function(noise_bias_act, (c, *small), c, *small, act=act, alpha=alpha, gain=gain)
    check_act(c, d, noise, strength, bias, act, alpha, gain)
    if d is None and noise is None and bias is None and act == "linear" and gain == 1:
        return c
    kind = wide_dtype(c.dtype)
    n, d, f, h = (t if t is None or t.dtype == kind else t.to(kind) for t in (noise, d, strength, bias))
    f = f if f is None else f.reshape(-1, 1)
    h = h if h is None or h.dim() == 2 else h.unsqueeze(0)
    slope = 1.0 if act == "linear" else float(alpha)
    # A projector searches for noise maps. Their gradient is PyTorch's own, through the reference.
    if n is not None and n.requires_grad and torch.is_grad_enabled():
        return noise_bias_act_forward.reference(c, n, d, f, h, slope, float(gain))
    n, d, f, h = (t if t is None else t.contiguous() for t in (n, d, f, h))
    refuse_transforms("noise_bias_act")
    return run(_NoiseBiasAct, c, n, d, f, h, slope, float(gain), forced_backend())


def check_act(
    c: Tensor,
    d: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    alpha: float,
    gain: float,
    name: str = "c",
) -> None:
    """Raises what noise_bias_act says it raises; c is called `name`."""
    check_tensor(c, name)
    if c.dim() != 4:
        raise ValueError(f"{name} must have shape [B, C, H, W], got {list(c.shape)}")
    b, channels, *size = c.shape
    for label, tensor in (("d", d), ("noise", noise), ("strength", strength), ("bias", bias)):
        if tensor is not None:
            check_beside(tensor, label, c, name, optional=True)
    if (noise is None) != (strength is None):
        raise ValueError("noise and strength go together: give both or neither")
    if d is not None and d.shape != (b, channels):
        raise ValueError(f"d must have shape [{b}, {channels}], got {list(d.shape)}")
    if noise is not None and noise.shape not in ((b, 1, *size), (1, 1, *size)):
        raise ValueError(f"noise must have shape [{b} or 1, 1, {size[0]}, {size[1]}], got {list(noise.shape)}")
    if strength is not None and strength.numel() != 1 and strength.shape != (b, 1):
        raise ValueError(f"strength must hold one element or have shape [{b}, 1], got {list(strength.shape)}")
    if bias is not None and bias.shape not in ((channels,), (b, channels)):
        raise ValueError(f"bias must have shape [{channels}] or [{b}, {channels}], got {list(bias.shape)}")
    if act not in ("linear", "lrelu"):
        raise ValueError(f'act must be "linear" or "lrelu", got {act!r}')
    check_factor(alpha, "alpha")
    check_factor(gain, "gain")


# Launchers. c, y and their gradients are dense and laid out alike, all others contiguous.


def planes(c: Tensor, n: Tensor | None = None) -> list[int]:
    """c as it lies in memory: B, C, P, whether channels are last, and the noise's stride along B."""
    last = not c.is_contiguous()
    positions = c.shape[2] * c.shape[3]
    return [c.shape[0], c.shape[1], positions, last, 0 if n is None or n.shape[0] == 1 else positions]


def addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _stacked(c: Tensor, d: Tensor | None, f: Tensor | None, h: Tensor | None) -> Tensor:
    """d, f, h as [3, B, C], those that are missing as what changes nothing."""
    k = torch.zeros(3, *c.shape[:2], dtype=wide_dtype(c.dtype))
    for part, given in zip(k, (d, f, h), strict=True):
        if given is not None:
            part.copy_(given)
    return k if d is not None else k.index_fill_(0, torch.tensor(0), 1.0)


@noise_bias_act_forward.register("cpp")
def _(native, c, n, d, f, h, slope, gain):
    y, code, k = torch.empty_like(c), DTYPE_CODES[c.dtype], _stacked(c, d, f, h)
    native.noise_bias_act_cpu(code, *addresses(c, n, k, y), planes(c, n), slope, gain, torch.get_num_threads())
    return y


@noise_bias_act_backward.register("cpp")
def _(native, gy, y, n, d, f, h, slope, gain):
    k = _stacked(y, d, f, h)
    gc, sums, code = torch.empty_like(gy), torch.empty_like(k), DTYPE_CODES[y.dtype]
    pointers, threads = addresses(gy, y, n, k, gc, sums), torch.get_num_threads()
    native.noise_bias_act_backward_cpu(code, *pointers, planes(gy, n), slope, gain, threads)
    sums[0] /= k[0]
    return gc, sums


@noise_bias_act_double_backward.register("cpp")
def _(native, hc, gy, y, n, k, slope, gain):
    dgy, dy, dd, code = torch.empty_like(y), torch.empty_like(y), torch.empty_like(k[0]), DTYPE_CODES[y.dtype]
    pointers, threads = addresses(hc, gy, y, n, k, dgy, dy, dd), torch.get_num_threads()
    native.noise_bias_act_double_backward_cpu(code, *pointers, planes(y, n), slope, gain, threads)
    return dgy, dy, dd


@noise_bias_act_forward.register("triton")
def _(kernels, c, n, d, f, h, slope, gain):
    return kernels.noise_bias_act(c, n, d, f, h, slope, gain)


@noise_bias_act_backward.register("triton")
def _(kernels, gy, y, n, d, f, h, slope, gain):
    return kernels.noise_bias_act_backward(gy, y, n, d, f, h, slope, gain)


@noise_bias_act_double_backward.register("triton")
def _(kernels, hc, gy, y, n, k, slope, gain):
    return kernels.noise_bias_act_double_backward(hc, gy, y, n, k, slope, gain)
