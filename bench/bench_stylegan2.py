"""StyleGAN2-256's generator (config f) as a whole: forward and backward of a batch of 4, and a path length step of 2.

Everyone runs on the same weights, latents and noise; the networks differ in the formulation of their layers alone
(bench_modulated_conv2d). A path length step is that of training: images, the norm of the derivative by w, its gradient.
"""

import functools
import importlib
import math
import sys

import pytest
import torch
from bench_modulated_conv2d import filter_of, plain, public
from measure import OURS, whole_steps
from torch.nn import functional as F

from minegan_fast.layers import path_length_penalty
from minegan_fast.models import StyleGAN2Generator

PASSES = {"forward + backward": 4, "path length": 2}  # and the batch, on a GPU 4 times that
NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain_rgb(x, weight, style):
    return F.conv2d(x * (style / math.sqrt(weight.shape[1]))[:, :, None, None].to(x.dtype), weight.to(x.dtype))


def public_rgb(x, weight, style):
    w = (weight[None] / math.sqrt(weight.shape[1]) * style[:, None, :, None, None]).to(x.dtype)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), w.flatten(0, 1), groups=len(x))
    return y.reshape(len(x), -1, *x.shape[2:])


def plain_doubled(image):
    weight = filter_of(image).expand(image.shape[1], 1, -1, -1)
    return F.conv_transpose2d(image, weight, stride=2, padding=1, groups=image.shape[1])


def public_doubled(image, ops=None):
    if ops is not None:
        return ops.upfirdn2d(image, filter_of(image), up=2, pad=(2, 1))
    B, C, H, W = image.shape
    stuffed = F.pad(image.reshape(B * C, 1, H, 1, W, 1), (0, 1, 0, 0, 0, 1)).reshape(B * C, 1, 2 * H, 2 * W)
    return F.conv2d(F.pad(stuffed, (2, 1, 2, 1)), filter_of(image)[None, None]).reshape(B, C, 2 * H, 2 * W)


FORMULATIONS = {"plain": (plain, plain_rgb, plain_doubled), "public": (public, public_rgb, public_doubled)}


@pytest.fixture(scope="module")
def formulations(pytestconfig):
    """With --public-ops also the public formulation over the CUDA ops of a project that was built here."""
    folder = pytestconfig.getoption("--public-ops")
    if folder is None:
        return FORMULATIONS
    sys.path.insert(0, str(folder))
    ops = importlib.import_module("op")
    own = functools.partial(public, ops=ops), public_rgb, functools.partial(public_doubled, ops=ops)
    return FORMULATIONS | {"public, its own ops": own}


def synthesis(G, w, maps, formulation):
    """G.synthesis in another formulation of its layers."""
    conv, rgb, doubled = formulation

    def styled(layer, x, k):
        style = layer.conv.modulation(w[:, k])
        return conv(x, layer.conv.weight[0], style, layer.noise.weight, layer.activate.bias, noise=maps[k])

    def colours(layer, x, k):
        y = rgb(x, layer.conv.weight[0], layer.conv.modulation(w[:, k]))
        return y + layer.bias.to(y.dtype)

    x = G.input.input.expand(len(w), -1, -1, -1)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    x = styled(G.conv1, x, 0)
    image = colours(G.to_rgb1, x, 1)
    for j, layer in enumerate(G.to_rgbs):
        for k in (2 * j + 1, 2 * j + 2):
            x = styled(G.convs[k - 1], x, k)
        image = colours(layer, x, 2 * j + 3) + doubled(image)
    return image


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("step", PASSES)
def test_generator(benchmark, device, recorder, pytestconfig, formulations, step, dtype):
    quick = pytestconfig.getoption("--quick")
    torch.manual_seed(0)
    G = StyleGAN2Generator(16 if quick else 256, channel_base=256 if quick else 32768).to(device)
    batch = PASSES[step] * (4 if device == "cuda" else 1)
    z = torch.randn(batch, G.latent_dim, device=device)
    maps = [torch.randn(batch, 1, *n.shape[2:], device=device) for n in G.noises.buffers()]
    parameters = list(G.parameters())

    def make(run):
        def call():
            with torch.autocast(device, NAMES[dtype], enabled=dtype != "float32"):
                w = G.mapping(z)[:, None].expand(-1, G.num_layers, -1)
                w = w.clone() if step == "path length" else w
                images = run(w)
            if step == "path length":
                seeded = torch.Generator(device).manual_seed(1)
                loss = path_length_penalty(images, w, mean=0.0, generator=seeded)[0]
            else:
                loss = images.float().square().mean()
            return loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)

        return lambda: call

    runs = {OURS: lambda w: G.synthesis(w, maps)}
    for name, formulation in formulations.items():
        runs[name] = functools.partial(synthesis, G, maps=maps, formulation=formulation)
    if step != "path length" and not quick:  # torch.compile has no second order
        torch.compiler.reset()
        runs["torch.compile"] = torch.compile(runs["plain"], dynamic=False)
    calls = {name: make(run)() for name, run in runs.items()}
    expected = calls["plain"]()[0]
    for name, call in calls.items():  # also what compiles and allocates
        # bfloat16 rounds to 2^-9 some 100 times on the way to a pixel, in another order in each formulation.
        torch.testing.assert_close(call()[0], expected, rtol=1e-3 if dtype == "float32" else 0.1, atol=1e-3, msg=name)
    if benchmark.disabled:
        return
    shape = [batch, 3, G.resolution, G.resolution]
    key = {"op": "stylegan2", "pass": step, "shape": shape, "dtype": dtype}
    recorder.add(whole_steps(key, calls, device))
    benchmark.pedantic(calls[OURS])
