"""The demodulation coefficients as StyleGAN2's layers have them: a weight's norms and a few styles. Small."""

import functools

import torch
from clock import Provider
from measure import OURS, Case, clone_of, make_pass

from minegan_fast.ops.demodulation import demodulation

DTYPES = (torch.float32,)
SHAPES = {  # B, I, O, k
    "cpu": [(16, 64, 64, 3), (4, 512, 512, 3)],
    "cuda": [(16, 128, 128, 3), (16, 512, 512, 3)],
}


# tensors of the weight's size that must move: W | W | W, gW | W, dgW, gW
TENSORS = {"inference": 1, "forward": 1, "backward": 2, "double backward": 3}


def ours(s, weight):
    return demodulation(s, weight, None, None, 1e-8)


def eager(s, weight):
    return torch.rsqrt(s.square() @ weight.square().sum((2, 3)).t() + 1e-8)


@functools.lru_cache(maxsize=1)
def compiled(shape):
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False, fullgraph=True)


def test_demodulation(compare, device, shape, dtype, which):
    B, inputs, outputs, k = shape
    generator = torch.Generator(device).manual_seed(0)
    sizes = (B, inputs), (outputs, inputs, k, k), (B, outputs), (B, inputs), (outputs, inputs, k, k)
    s, w, dy, ds, dw = (torch.randn(n, device=device, generator=generator).to(dtype).requires_grad_() for n in sizes)
    doubles = [t.detach().double().requires_grad_() for t in (s, w, dy, ds, dw)]
    expected = make_pass(which, eager, doubles[:2], doubles[2], doubles[3:])()()
    bytes_moved = TENSORS[which] * w.numel() * w.element_size()
    case = Case("demodulation", which, shape, dtype, bytes_moved, [e.detach() for e in expected])
    providers = [
        Provider(OURS, make_pass(which, ours, (s, w), dy, (ds, dw)), backend)
        for backend in ("triton", "cpp", "reference")
    ]
    for other, function in (("eager", eager), ("torch.compile", compiled(shape))):
        providers.append(Provider(other, make_pass(which, function, (s, w), dy, (ds, dw))))
    compare(case, [*providers, clone_of(bytes_moved, device)])
