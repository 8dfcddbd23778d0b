"""modulated_conv2d at layers of StyleGAN2-256 (config f), without and with upsampling, the rest of the layer included.

Competitors: weights of each sample and a grouped convolution, as public implementations have it, with filters that pad
and convolve [B C, 1, H, W] where no op of their own could be built; the plain formulation, which scales activations;
torch.compile of that.
"""

import functools
import math

import torch
from clock import Provider
from measure import OURS, Case, make_pass
from torch.nn import functional as F

from minegan_fast.ops import modulated_conv2d

DTYPES = (torch.float32, torch.bfloat16)
# B, I, O, H of x, 2 with upsampling
SHAPES = {
    "cpu": [(4, 512, 512, 32, 1), (4, 256, 128, 64, 2)],
    "cuda": [(16, 512, 512, 32, 1), (16, 512, 512, 64, 1), (16, 256, 128, 128, 2), (16, 128, 128, 256, 1)],
}
TAPS = (1.0, 3.0, 3.0, 1.0)
GAIN = 2**0.5


def filter_of(x):
    taps = torch.tensor(TAPS, dtype=x.dtype, device=x.device) / 4
    return torch.outer(taps, taps)


def finish(y, noise, strength, bias):
    y = y + strength.to(y.dtype) * noise.to(y.dtype)
    return F.leaky_relu(y + bias.to(y.dtype)[:, None, None], 0.2) * GAIN


def public(x, weight, style, strength, bias, *, noise, ops=None):
    """Per-sample weights, a grouped convolution; the filter over single planes. ops: a public project's own, by its
    names `upfirdn2d` and `fused_leaky_relu`."""
    (B, inputs, H, W), (outputs, _, size, _) = x.shape, weight.shape
    w = weight[None] / math.sqrt(inputs * size * size) * style[:, None, :, None, None]
    w = w * torch.rsqrt(w.square().sum((2, 3, 4)) + 1e-8)[..., None, None, None]
    w, planes = w.to(x.dtype), x.reshape(1, B * inputs, H, W)
    if noise.shape[2] == H:
        y = F.conv2d(planes, w.flatten(0, 1), padding=size // 2, groups=B)
    else:
        y = F.conv_transpose2d(planes, w.transpose(1, 2).flatten(0, 1), stride=2, groups=B)
        y = y.reshape(B, outputs, *y.shape[2:])
        if ops is None:
            y = F.conv2d(F.pad(y.flatten(0, 1)[:, None], (1, 1, 1, 1)), filter_of(x)[None, None])
        else:
            y = ops.upfirdn2d(y, filter_of(x), pad=(1, 1))
    y = y.reshape(B, outputs, *y.shape[-2:])
    if ops is None:
        return finish(y, noise, strength, bias)
    return ops.fused_leaky_relu(y + strength.to(y.dtype) * noise.to(y.dtype), bias.to(y.dtype))


def plain(x, weight, style, strength, bias, *, noise):
    scale = 1 / math.sqrt(weight[0].numel())
    s = style * scale
    d = torch.rsqrt(F.linear(s.square(), weight.square().sum((2, 3))) + 1e-8)
    x, weight = x * s[:, :, None, None].to(x.dtype), weight.to(x.dtype)
    if noise.shape[2] == x.shape[2]:
        y = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    else:
        y = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        y = F.conv2d(y, filter_of(x).expand(y.shape[1], 1, -1, -1), padding=1, groups=y.shape[1])
    return finish(y * d[:, :, None, None].to(y.dtype), noise, strength, bias)


def ours(x, weight, style, strength, bias, *, noise):
    up = noise.shape[2] != x.shape[2]
    scale = 1 / math.sqrt(weight[0].numel())
    return modulated_conv2d(
        x, weight, style, up=up, kernel=filter_of(style) if up else None, scale=scale,
        noise=noise, strength=strength, bias=bias, act="lrelu", gain=GAIN,
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def compiled(shape, dtype):
    torch.compiler.reset()
    return torch.compile(plain, dynamic=False, fullgraph=True)


def test_modulated_conv2d(compare, device, shape, dtype, which):
    generator = torch.Generator(device).manual_seed(0)
    B, inputs, outputs, H, up = shape

    def normal(*size, kind=torch.float32):
        x = torch.randn(size, device=device, generator=generator).to(kind)
        return x.contiguous(memory_format=torch.channels_last) if kind == dtype and len(size) == 4 else x

    x, gy = normal(B, inputs, H, H, kind=dtype), normal(B, outputs, up * H, up * H, kind=dtype)
    noise = normal(B, 1, up * H, up * H)
    # The bias keeps every sum away from the kink, on whose sides rounding would tell the formulations apart.
    small = [normal(outputs, inputs, 3, 3).contiguous(), 1 + 0.3 * normal(B, inputs), normal(1), normal(outputs) + 20]
    tensors = tuple(t.requires_grad_() for t in (x, *small))
    cotangents = tuple(map(torch.randn_like, tensors))
    # In float32 what float64 is elsewhere: its convolutions take a CPU minutes.
    exact = [t.detach().float().contiguous().requires_grad_() for t in (*tensors, gy, *cotangents)]
    function = functools.partial(plain, noise=noise)
    expected = [e.detach() for e in make_pass(which, function, tuple(exact[:5]), exact[5], tuple(exact[6:]))()()]
    passes = {"inference": 1, "forward": 1, "backward": 2, "double backward": 4}[which]
    flops = passes * 2 * B * inputs * outputs * 9 * H * H
    moved = (x.numel() + gy.numel()) * x.element_size() * passes
    rounding = 64 * torch.finfo(dtype).eps
    case = Case(
        "modulated_conv2d", which, shape, dtype, moved, expected, flops=flops, rounding=rounding, yardstick="plain"
    )
    arguments = tensors, gy.requires_grad_(), cotangents
    providers = [
        Provider(OURS, make_pass(which, functools.partial(ours, noise=noise), *arguments), backend)
        for backend in ("triton", "cpp", "reference")
    ]
    for name, one in (("plain", plain), ("public", public), ("torch.compile", compiled(shape, dtype))):
        providers.append(Provider(name, make_pass(which, functools.partial(one, noise=noise), *arguments)))
    compare(case, providers)
