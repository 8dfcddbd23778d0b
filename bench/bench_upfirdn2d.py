"""upfirdn2d as StyleGAN2-256 (config f) has it: blurs beside strided convolutions, the resampled images. Memory-bound.

Of PyTorch's own ways the depthwise convolution is measured as "eager", and the one that public fallbacks take, padding
and a convolution of [B C, 1, H, W], as "reshaped".
"""

import functools

import pytest
import torch
from clock import Provider
from measure import OURS, Case, clone_of, make_pass
from torch.nn import functional as F

from minegan_fast.ops import upfirdn2d

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = {  # the layer's output
    "cpu": [(4, 512, 16, 16), (4, 512, 64, 64), (4, 128, 256, 256)],
    "cuda": [(16, 512, 16, 16), (16, 512, 64, 64), (16, 256, 128, 128), (16, 128, 256, 256)],
}
KINDS = {  # up, down, padding (left and top, right and bottom)
    "blur": (1, 1, (1, 1)),
    "blur, channels last": (1, 1, (1, 1)),
    "twice": (2, 1, (2, 1)),
    "half": (1, 2, (1, 1)),
}
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


def ours(x, taps, up, down, padding):
    return upfirdn2d(x, taps, up, down, padding * 2)


def eager(x, taps, up, down, padding):
    C = x.shape[1]
    weight = torch.outer(taps, taps).to(x.dtype).expand(C, 1, -1, -1)
    if up > 1:
        return F.conv_transpose2d(x, weight, stride=up, padding=len(taps) - 1 - padding[0], groups=C)
    return F.conv2d(x, weight, stride=down, padding=padding[0], groups=C)


def reshaped(x, taps, up, down, padding):
    B, C, H, W = x.shape
    x = F.pad(x.reshape(B * C, 1, H, 1, W, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(B * C, 1, H * up, W * up)
    y = F.conv2d(F.pad(x, padding * 2), torch.outer(taps, taps).to(x.dtype)[None, None], stride=down)
    return y.reshape(B, C, *y.shape[2:])


@functools.lru_cache(maxsize=1)
def compiled(shape, dtype, kind):
    torch.compiler.reset()  # else the ninth shape would silently run eagerly
    return torch.compile(eager, dynamic=False, fullgraph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_upfirdn2d(compare, device, shape, dtype, which, kind):
    up, down, padding = KINDS[kind]
    B, C, *out = shape
    size = [(n - 1) * down + len(TAPS) - sum(padding) if up == 1 else n // up for n in out]
    layout = torch.channels_last if "channels last" in kind else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        x = torch.randn(size, device=device, generator=generator).to(dtype)
        return x.contiguous(memory_format=layout).requires_grad_()

    x, dy, ddx = normal(B, C, *size), normal(*shape), normal(B, C, *size)
    taps = TAPS.to(device)

    def at(function, taps=taps):
        return lambda x: function(x, taps, up, down, padding)

    doubles = [t.detach().double().requires_grad_() for t in (x, dy, ddx)]
    expected = make_pass(which, at(eager, taps.double()), doubles[:1], doubles[1], doubles[2:])()()
    bytes_moved = (x.numel() + dy.numel()) * x.element_size()
    extra = {"kind": kind}
    case = Case("upfirdn2d", which, shape, dtype, bytes_moved, [e.detach() for e in expected], extra=extra)
    functions = {"eager": eager, "reshaped": reshaped, "torch.compile": compiled(shape, dtype, kind)}
    providers = [
        Provider(OURS, make_pass(which, at(ours), (x,), dy, (ddx,)), backend)
        for backend in ("cuda", "triton", "cpp", "reference")
    ]
    providers += [Provider(name, make_pass(which, at(f), (x,), dy, (ddx,))) for name, f in functions.items()]
    compare(case, [*providers, clone_of(bytes_moved, device)])
