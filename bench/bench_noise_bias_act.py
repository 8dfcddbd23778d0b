"""noise_bias_act behind convolutions of StyleGAN2-256 (config f), channels-last as they are there. Memory-bound."""

import functools

import torch
from clock import Provider
from measure import OURS, Case, clone_of, make_pass
from torch.nn import functional as F

from minegan_fast.ops import noise_bias_act

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = {
    "cpu": [(4, 512, 16, 16), (4, 512, 64, 64), (4, 128, 256, 256)],
    "cuda": [(16, 512, 32, 32), (16, 512, 64, 64), (16, 256, 128, 128), (16, 128, 256, 256)],
}
GAIN = 2**0.5
# images that must move: c, y | c, y | gy, y, gc | hc, gy, y, dgy, dy
TENSORS = {"inference": 2, "forward": 2, "backward": 3, "double backward": 5}


def ours(c, d, strength, bias, *, noise):
    return noise_bias_act(c, d, noise, strength, bias, act="lrelu", gain=GAIN)


def eager(c, d, strength, bias, *, noise):
    y = c * d[:, :, None, None].to(c.dtype) + strength.to(c.dtype) * noise.to(c.dtype)
    return F.leaky_relu(y + bias.to(c.dtype)[:, None, None], 0.2) * GAIN


@functools.lru_cache(maxsize=1)
def compiled(shape, dtype):
    torch.compiler.reset()  # else the ninth shape would silently run eagerly
    return torch.compile(eager, dynamic=False, fullgraph=True)


def test_noise_bias_act(compare, device, shape, dtype, which):
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(size, device=device, generator=generator)

    def image():
        return normal(*shape).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()

    noise = normal(shape[0], 1, *shape[2:])
    small = [(normal(*shape[:2]).abs() + 0.5), normal(1), normal(shape[1])]
    inputs = (image(), *(t.requires_grad_() for t in small))
    gy, cotangents = image(), (image(), *map(torch.randn_like, small))

    def run(function, noise):
        return functools.partial(function, noise=noise)

    doubles = [t.detach().double().requires_grad_() for t in (*inputs, gy, *cotangents)]
    expected = make_pass(which, run(eager, noise.double()), tuple(doubles[:4]), doubles[4], tuple(doubles[5:]))()()
    bytes_moved = TENSORS[which] * inputs[0].numel() * inputs[0].element_size()
    # c comes back out of the rounded y, so that sums are as exact as y is.
    rounding = 4 * torch.finfo(dtype).eps
    case = Case("noise_bias_act", which, shape, dtype, bytes_moved, [e.detach() for e in expected], rounding=rounding)
    arguments = inputs, gy, cotangents
    providers = [
        Provider(OURS, make_pass(which, run(ours, noise), *arguments), backend)
        for backend in ("triton", "cpp", "reference")
    ]
    providers.append(Provider("eager", make_pass(which, run(eager, noise), *arguments)))
    providers.append(Provider("torch.compile", make_pass(which, run(compiled(shape, dtype), noise), *arguments)))
    compare(case, [*providers, clone_of(bytes_moved, device)])
