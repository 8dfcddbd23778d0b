"""minibatch_stddev as the critics of StyleGAN2 (groups of 4) and Progressive GAN (the whole batch) have it: small."""

import functools

import pytest
import torch
from clock import Provider
from measure import OURS, Case, clone_of, make_pass

from minegan_fast.ops import minibatch_stddev

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = {"cpu": [(4, 512, 4, 4), (32, 512, 4, 4)], "cuda": [(16, 512, 4, 4), (64, 512, 4, 4)]}
GROUPS = {"groups of 4": 4, "whole batch": None}
# tensors of x's size that must move: x, y | x, y | dy, x, dx | ddx, x, ddy: the last pass is the gradient by dy alone
TENSORS = {"inference": 2, "forward": 2, "backward": 3, "double backward": 3}


def ours(x, group):
    return minibatch_stddev(x, group)


def eager(x, group):
    B, C, H, W = x.shape
    size = group or B
    y = x.view(size, B // size, C, H, W).to(torch.promote_types(x.dtype, torch.float32))
    spread = (y.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3)).to(x.dtype)
    return torch.cat((x, spread.repeat(size).view(B, 1, 1, 1).expand(B, 1, H, W)), 1)


@functools.lru_cache(maxsize=1)
def compiled(shape, dtype, name):
    torch.compiler.reset()  # else the ninth shape would silently run eagerly
    return torch.compile(eager, dynamic=False, fullgraph=True)


@pytest.mark.parametrize("name", GROUPS)
def test_minibatch_stddev(compare, device, shape, dtype, which, name):
    B, C, H, W = shape
    generator = torch.Generator(device).manual_seed(0)
    sizes = shape, (B, C + 1, H, W), shape
    x, dy, ddx = (torch.randn(s, device=device, generator=generator).to(dtype).requires_grad_() for s in sizes)

    def at(function):
        return lambda x: function(x, GROUPS[name])

    doubles = [t.detach().double().requires_grad_() for t in (x, dy, ddx)]
    expected = make_pass(which, at(eager), doubles[:1], doubles[1], doubles[2:])()()
    bytes_moved = TENSORS[which] * x.numel() * x.element_size()
    extra = {"groups": name}
    case = Case("minibatch_stddev", which, shape, dtype, bytes_moved, [e.detach() for e in expected], extra=extra)
    providers = [
        Provider(OURS, make_pass(which, at(ours), (x,), dy, (ddx,)), backend)
        for backend in ("triton", "cpp", "reference")
    ]
    for other, function in (("eager", eager), ("torch.compile", compiled(shape, dtype, name))):
        providers.append(Provider(other, make_pass(which, at(function), (x,), dy, (ddx,))))
    compare(case, [*providers, clone_of(bytes_moved, device)])
