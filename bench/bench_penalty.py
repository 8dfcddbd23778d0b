"""Penalties: the norm of a gradient and its penalty, interpolation, and whole steps of a critic.

The first are memory-bound: the forward reads g, the backward reads it and writes as much; an interpolation reads two
batches and writes one. A step is forward, penalty and backward to the weights: R1 of StyleGAN2-256's discriminator
(config f), against the same equations in plain layers of PyTorch, and WGAN-GP of a ResNet critic at 64 pixels, the very
same module under plain autograd.
"""

import functools
import math

import pytest
import torch
from clock import Provider
from measure import OURS, Case, clone_of, whole_steps
from torch import nn
from torch.nn import functional as F

from minegan_fast.layers import gradient_penalty, r1_penalty
from minegan_fast.models import StyleGAN2Discriminator
from minegan_fast.models.layers import Blur
from minegan_fast.models.stylegan2_layers import EqualConv2d
from minegan_fast.ops import interpolate
from minegan_fast.ops.penalty import interpolate_drawn, penalty_on

BACKENDS = ("triton", "cpp", "reference")
SIZES = {
    "cpu": [(4, 3, 64, 64), (16, 3, 256, 256), (4, 3, 1024, 1024)],
    "cuda": [(64, 3, 128, 128), (16, 3, 256, 256), (4, 3, 1024, 1024), (16, 3, 1024, 1024)],
}
LARGEST = {"test_norm": "[3", "test_interpolation": "[3"}


@pytest.fixture(params=range(4))
def shape(request, device, pytestconfig):
    sizes = SIZES[device][: 1 if pytestconfig.getoption("--quick") else None]
    if request.param >= len(sizes):
        pytest.skip("no such size here")
    return sizes[request.param]


def norm(g):
    return penalty_on(g, center=1.0)[0]


def eager_norm(g):
    return (g.flatten(1).norm(2, dim=1) - 1).square().mean()


def sum_of_squares(g):
    return (g.flatten(1).square().sum(1).sqrt() - 1).square().mean()


def by_hand(step, g):
    """The floor of what PyTorch's kernels allow: one reads g for its norms, another writes a multiple of g."""
    x, one = g.detach(), (-1, *[1] * (g.dim() - 1))

    def call():
        r = x.flatten(1).norm(2, dim=1)
        P = (r - 1).square().mean()
        return (P,) if step == "forward" else (P, x * (2 / len(x) * (1 - 1 / r)).view(one))

    return lambda: call


def make_norm(step, function, g):
    def call():
        P = function(g)
        return (P.detach(),) if step == "forward" else (P.detach(), *torch.autograd.grad(P, g))

    return lambda: call


@pytest.mark.parametrize("step", ["forward", "forward + backward"])
def test_norm(compare, device, shape, step):
    generator, size = torch.Generator(device).manual_seed(0), math.prod(shape[1:])
    g = (torch.randn(shape, device=device, generator=generator) / size**0.5 * 3).requires_grad_()
    expected = make_norm(step, eager_norm, g.detach().double().requires_grad_())()()
    torch.compiler.reset()
    compiled = torch.compile(eager_norm, dynamic=False, fullgraph=True)
    bytes_moved = g.nbytes * (1 if step == "forward" else 3)
    # Tensor.norm adds up in float32, a few running sums a sample.
    rounding = torch.finfo(g.dtype).eps * size**0.5 / 16
    case = Case("penalty", f"norm {step}", shape, g.dtype, bytes_moved, expected, rounding=rounding)
    providers = [Provider(OURS, make_norm(step, norm, g), backend) for backend in BACKENDS]
    others = {"eager": eager_norm, "sum of squares": sum_of_squares, "torch.compile": compiled}
    providers += [Provider(name, make_norm(step, function, g)) for name, function in others.items()]
    providers.append(Provider("by hand", by_hand(step, g)))
    compare(case, [*providers, clone_of(bytes_moved, device)])


def test_interpolation(compare, device, shape):
    generator = torch.Generator(device)
    real, fake = torch.randn(2, *shape, device=device, generator=generator.manual_seed(0))
    per_sample = (len(real), 1, 1, 1)
    if device == "cuda":
        alpha = interpolate_drawn.reference(
            torch.ones_like(real[:, :1, :1, :1]), torch.zeros(per_sample, device=device), 1, 0
        )
    else:
        alpha = torch.rand(per_sample, device=device, generator=generator.manual_seed(1))

    def eager():
        torch.rand(per_sample, device=device)  # its numbers are others
        return (alpha * real + (1 - alpha) * fake,)

    calls = {
        OURS: lambda: (interpolate(real, fake, generator=generator.manual_seed(1)),),
        "eager": eager,
        "torch.lerp": lambda: (torch.lerp(fake, real, alpha),),
    }
    expected = torch.lerp(fake.double(), real.double(), alpha.double())
    case = Case("penalty", "interpolation", shape, real.dtype, 3 * real.nbytes, [expected])
    providers = [Provider(name, lambda call=call: call) for name, call in calls.items()]
    compare(case, [*providers, clone_of(case.bytes, device)])


def plain_layers(layers, x):
    """A ConvLayer of StyleGAN2 in plain layers of PyTorch, strides where public code has them."""
    stride = 2 if isinstance(layers[0], Blur) else 1
    for layer in layers:
        if isinstance(layer, Blur):
            x = F.conv2d(x, layer.kernel.expand(x.shape[1], 1, -1, -1), padding=layer.padding, groups=x.shape[1])
        elif isinstance(layer, EqualConv2d):
            x = F.conv2d(x, layer.weight * layer.scale, stride=stride, padding=layer.padding)
        else:
            x = F.leaky_relu(x + layer.bias.view(-1, 1, 1), 0.2) * math.sqrt(2)
    return x


def plain_stylegan2(D, x):
    x = plain_layers(D.convs[0], x)
    for block in D.convs[1:]:
        y = plain_layers(block.conv2, plain_layers(block.conv1, x))
        x = (y + plain_layers(block.skip, x)) / math.sqrt(2)
    groups = x.view(min(4, len(x)), -1, *x.shape[1:])
    deviation = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    x = torch.cat([x, deviation.repeat(len(groups)).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], 1)
    x = plain_layers(D.final_conv, x).flatten(1)
    one, two = D.final_linear
    x = F.leaky_relu(F.linear(x, one.weight * one.scale, one.bias * one.lr_mul), 0.2) * math.sqrt(2)
    return F.linear(x, two.weight * two.scale, two.bias * two.lr_mul)[:, 0]


class Residual(nn.Module):
    def __init__(self, channels: int, half: bool):
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.half = half

    def forward(self, x):
        x = x + self.two(F.relu(self.one(F.relu(x))))
        return F.avg_pool2d(x, 2) if self.half else x


class ResNet(nn.Module):
    """A critic of the WGAN-GP paper's kind."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*[Residual(channels, half) for half in (True, True, True, False)])
        self.last = nn.Linear(channels, 1)

    def forward(self, x):
        return self.last(F.relu(self.blocks(self.first(x))).mean((2, 3)))


def plain_gradient(critic, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(critic(x).sum(), x, create_graph=True)[0].flatten(1)


def plain_r1(critic, x):
    return plain_gradient(critic, x).square().sum(1).mean()


def plain_wgan_gp(critic, real, fake, generator):
    alpha = torch.rand(len(real), 1, 1, 1, device=real.device, generator=generator)
    return (plain_gradient(critic, alpha * real + (1 - alpha) * fake).norm(2, dim=1) - 1).square().mean()


def r1_step(device: str, quick: bool):
    D = StyleGAN2Discriminator(16 if quick else 256, channel_base=256 if quick else 32768).to(device)
    real = torch.randn(16 if device == "cuda" else 2, 3, D.resolution, D.resolution, device=device)
    plain = functools.partial(plain_stylegan2, D)
    losses = {OURS: lambda: r1_penalty(D, real), "plain layers": lambda: plain_r1(plain, real)}
    return D, real, losses | {"our layers, PyTorch's second order": lambda: plain_r1(D, real)}


def wgan_gp_step(device: str, quick: bool):
    D = ResNet(8 if quick else 128).to(device)
    real, fake = torch.randn(2, 64 if device == "cuda" else 8, 3, *(16, 16) if quick else (64, 64), device=device)
    generator = torch.Generator(device)
    # The numbers drawn are others on a GPU: there only the size of the results is held.
    losses = {OURS: lambda: gradient_penalty(D, real, fake, generator=generator.manual_seed(1))}
    return D, real, losses | {"plain autograd": lambda: plain_wgan_gp(D, real, fake, generator.manual_seed(1))}


STEPS = {"R1 step, StyleGAN2": r1_step, "WGAN-GP step, ResNet": wgan_gp_step}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("step", STEPS)
def test_step(benchmark, device, recorder, pytestconfig, step):
    torch.manual_seed(0)
    D, images, losses = STEPS[step](device, pytestconfig.getoption("--quick"))
    parameters = list(D.parameters())

    def make(loss):
        def call():
            value = loss()
            return value.detach(), *torch.autograd.grad(value, parameters, allow_unused=True)

        return call

    calls = {name: make(loss) for name, loss in losses.items()}
    expected, *gradients = calls[list(calls)[1]]()
    same = device == "cpu" or step.startswith("R1")
    for name, call in calls.items():  # also what allocates
        value, *own = call()
        torch.testing.assert_close(value, expected, rtol=1e-3 if same else 0.1, atol=1e-4, msg=name)
        for a, b in zip(own, gradients, strict=True):
            if same and a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=1e-2 * float(b.abs().max()) + 1e-6, msg=name)
    if benchmark.disabled:
        return
    key = {"op": "penalty", "pass": step, "shape": list(images.shape), "dtype": "float32"}
    recorder.add(whole_steps(key, calls, device))
    benchmark.pedantic(calls[OURS], rounds=1)
