"""Progressive GAN from TensorFlow against the equations of its networks: gains, fused layers, biases, deviation."""

import math
import pickle

import pytest
import torch
from nvidia_files import named
from torch.nn import functional as F

from minegan_fast.models import inspect, load_discriminator, load_generator, save_model
from minegan_fast.models.layouts.pgan_tf import discriminator_layers, generator_layers

SQRT2 = math.sqrt(2)
WIDTHS = {4: 9, 8: 8, 16: 6, 32: 5}


class _Network:
    def __init__(self, variables):
        self.state = {
            "version": 2,
            "name": "G",
            "static_kwargs": {"num_channels": 3, "fused_scale": True},
            "build_module_src": "import os\nos.system('never run')\n",
            "build_func_name": "G_paper",
            "variables": [(name, tensor.numpy()) for name, tensor in variables.items()],
        }

    def __getstate__(self):
        return self.state


def write(path, *networks):
    with named("tfutil", "Network", _Network):
        path.write_bytes(pickle.dumps(tuple(map(_Network, networks))))


def filled(layers, lod):
    state = {"lod": torch.tensor(lod).double()}
    for name, (shape, bias) in layers.items():
        state[f"{name}/weight"] = torch.randn(shape, dtype=torch.float64)
        state[f"{name}/bias"] = torch.randn(bias, dtype=torch.float64)
    return state


def tf_generator(lod=0.0, latent=11):
    w, sizes = list(WIDTHS.values()), list(WIDTHS)
    layers = {"4x4/Dense": ((latent, 16 * w[0]), w[0]), "4x4/Conv": ((3, 3, w[0], w[0]), w[0])}
    for low, high, r in zip(w, w[1:], sizes[1:], strict=False):
        layers |= {f"{r}x{r}/Conv0_up": ((3, 3, high, low), high), f"{r}x{r}/Conv1": ((3, 3, high, high), high)}
    return filled(layers | {f"ToRGB_lod{3 - s}": ((1, 1, c, 3), 3) for s, c in enumerate(w)}, lod)


def tf_discriminator(lod=0.0):
    w, sizes = list(WIDTHS.values()), list(WIDTHS)
    layers = {"4x4/Conv": ((3, 3, w[0] + 1, w[0]), w[0]), "4x4/Dense0": ((16 * w[0], w[0]), w[0])}
    layers |= {"4x4/Dense1": ((w[0], 1), 1)}
    for low, high, r in zip(w, w[1:], sizes[1:], strict=False):
        layers |= {f"{r}x{r}/Conv0": ((3, 3, high, high), high), f"{r}x{r}/Conv1_down": ((3, 3, high, low), low)}
    return filled(layers | {f"FromRGB_lod{3 - s}": ((1, 1, 3, c), c) for s, c in enumerate(w)}, lod)


def scaled(p, name, fan_in, gain=SQRT2):
    return p[f"{name}/weight"] * gain / math.sqrt(fan_in)


def shifted(weight):
    """[3, 3, a, b] -> [a, b, 4, 4]: the sum of its four shifts."""
    wide = torch.zeros(*weight.shape[2:], 4, 4).double()
    for i in (0, 1):
        for j in (0, 1):
            wide[:, :, i : i + 3, j : j + 3] += weight.permute(2, 3, 0, 1)
    return wide


def biased(p, name, x, act=True):
    x = x + p[f"{name}/bias"].view(-1, *[1] * (x.ndim - 2))
    return torch.where(x > 0, x, 0.2 * x) if act else x


def conv(p, name, x, gain=SQRT2, act=True):
    weight = scaled(p, name, x.shape[1] * p[f"{name}/weight"].shape[0] ** 2, gain).permute(3, 2, 0, 1)
    return biased(p, name, F.conv2d(x, weight, padding=weight.shape[2] // 2), act)


def normalised(x):
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def doubled(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def reference_images(p, z, size):
    lod = p["lod"].item()
    z = normalised(z)
    x = (z @ scaled(p, "4x4/Dense", z.shape[1], SQRT2 / 4)).reshape(len(z), -1, 4, 4)
    x = normalised(conv(p, "4x4/Conv", normalised(biased(p, "4x4/Dense", x))))
    images = [conv(p, "ToRGB_lod3", x, gain=1.0, act=False)]
    for k, r in enumerate((8, 16, 32)):
        if r <= size:
            weight = shifted(scaled(p, f"{r}x{r}/Conv0_up", 9 * x.shape[1]))
            x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2, padding=1)
            x = normalised(biased(p, f"{r}x{r}/Conv0_up", x))
            x = normalised(conv(p, f"{r}x{r}/Conv1", x))
            images.append(conv(p, f"ToRGB_lod{2 - k}", x, gain=1.0, act=False))
    return torch.lerp(images[-1], doubled(images[-2]), lod % 1)


def reference_logits(p, x, size):
    lod, k = p["lod"].item(), int(math.log2(32 / size))
    below = conv(p, f"FromRGB_lod{k + 1}", F.avg_pool2d(x, 2))
    x = conv(p, f"FromRGB_lod{k}", x)
    for r in (32, 16, 8):
        if r <= size:
            x = conv(p, f"{r}x{r}/Conv0", x)
            weight = shifted(scaled(p, f"{r}x{r}/Conv1_down", 9 * x.shape[1])).transpose(0, 1) / 4
            x = biased(p, f"{r}x{r}/Conv1_down", F.conv2d(x, weight, stride=2, padding=1))
            x = torch.lerp(x, below, lod % 1) if r == size else x
    groups = len(x) // 4
    std = [(x[i % groups :: groups].var(0, unbiased=False) + 1e-8).sqrt().mean() for i in range(len(x))]
    x = conv(p, "4x4/Conv", torch.cat((x, torch.stack(std)[:, None, None, None].expand(-1, 1, 4, 4)), 1)).flatten(1)
    x = biased(p, "4x4/Dense0", x @ scaled(p, "4x4/Dense0", x.shape[1]))
    return biased(p, "4x4/Dense1", x @ scaled(p, "4x4/Dense1", x.shape[1], 1.0), act=False)[:, 0]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("lod", "size", "alpha"), [(0.0, 32, 1.0), (0.25, 32, 0.75), (1.0, 16, 1.0), (1.5, 16, 0.5)])
def test_networks_are_those_of_the_file(tmp_path, lod, size, alpha):
    raw, q, p = tf_generator(lod), tf_discriminator(lod), tf_generator(lod)
    write(tmp_path / "karras.pkl", raw, q, p)
    g, d = load_generator(tmp_path / "karras.pkl"), load_discriminator(tmp_path / "karras.pkl", family="pgan")
    assert (g.resolution, g.alpha, d.resolution, d.alpha) == (size, alpha, size, alpha)
    assert g.origin.averaged
    save_model(tmp_path / "own.safetensors", g, d)
    z, x = torch.randn(3, 11).double(), torch.randn(8, 3, size, size).double()
    for file in ("karras.pkl", "own.safetensors"):
        assert relative(load_generator(tmp_path / file)(z), reference_images(p, z, size)) < 1e-10
        assert relative(load_discriminator(tmp_path / file)(x), reference_logits(q, x, size)) < 1e-10
    assert {n.resolution for n in inspect(tmp_path / "karras.pkl").networks} == {size}


def test_what_does_not_fit_is_named(tmp_path):
    p, q = tf_generator(), tf_discriminator()
    lacking = {name: t for name, t in p.items() if name != "16x16/Conv1/bias"}
    for networks, message in (
        ((p, q, lacking), "16x16/Conv1/bias"),
        ((p, q, p | {"64x64/Odd/weight": torch.ones(2)}), "unexpected: 64x64/Odd/weight"),
    ):
        write(tmp_path / "karras.pkl", *networks)
        with pytest.raises(ValueError, match=message):
            load_generator(tmp_path / "karras.pkl")
    assert "lod" in generator_layers(p, None)
    assert "scaleLayers.1.0.module.weight" not in discriminator_layers(q, 8)
    with pytest.raises(ValueError, match=r"holds the resolutions \[4, 8, 16, 32\], not 64"):
        discriminator_layers(q, 64)
