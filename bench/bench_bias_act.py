"""bias_act at shapes of StyleGAN2-256 (config f): the mapping layer, small and large convolutions. Memory-bound."""

import functools

import torch
from clock import Provider
from measure import OURS, Case, clone_of, make_pass
from torch.nn import functional as F

from minegan_fast.ops import bias_act

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = {
    "cpu": [(4, 512), (4, 512, 8, 8), (4, 512, 64, 64), (4, 128, 256, 256)],
    "cuda": [
        (16, 512),
        (16, 512, 8, 8),
        (16, 512, 32, 32),
        (16, 512, 64, 64),
        (16, 256, 128, 128),
        (16, 128, 256, 256),
    ],
}
GAIN = 2**0.5
# tensors of x's size that must move: x, y | x, y | dy, y, dx | ddx, y, ddy; each pass also moves one of b's size
TENSORS = {"inference": 2, "forward": 2, "backward": 3, "double backward": 3}


def ours(x, b):
    return bias_act(x, b, act="lrelu", alpha=0.2, gain=GAIN)


def eager(x, b):
    return F.leaky_relu(x + b.view(-1, *[1] * (x.dim() - 2)), 0.2) * GAIN


@functools.lru_cache(maxsize=1)
def compiled(shape, dtype):
    torch.compiler.reset()  # else the ninth shape would silently run eagerly
    return torch.compile(eager, dynamic=False, fullgraph=True)


def test_bias_act(compare, device, shape, dtype, which):
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(size, device=device, generator=generator).to(dtype).requires_grad_()

    x, b, dy, ddx, ddb = normal(*shape), normal(shape[1]), normal(*shape), normal(*shape), normal(shape[1])
    tensors = ((x, b), dy, (ddx, ddb))
    doubles = tuple(t.detach().double().requires_grad_() for t in (x, b, dy, ddx, ddb))
    expected = make_pass(which, eager, doubles[:2], doubles[2], doubles[3:])()()
    bytes_moved = (TENSORS[which] * x.numel() + b.numel()) * x.element_size()
    case = Case("bias_act", which, shape, dtype, bytes_moved, [e.detach() for e in expected])
    providers = [
        Provider(OURS, make_pass(which, ours, *tensors), backend) for backend in ("cuda", "triton", "cpp", "reference")
    ]
    providers.append(Provider("eager", make_pass(which, eager, *tensors)))
    providers.append(Provider("torch.compile", make_pass(which, compiled(shape, dtype), *tensors)))
    compare(case, [*providers, clone_of(bytes_moved, device)])
