"""NVIDIA's pickles of StyleGAN2: read without their classes, and giving the images that their equations give."""

import math
import sys

import pytest
import torch
from nvidia_files import (
    ada_of,
    critic_of,
    network_tree,
    tf_of,
    write_tf_pickle,
    write_torch_pickle,
)
from torch.nn import functional as F

from minegan_fast.models import (
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    has_discriminator,
    load_discriminator,
    load_generator,
)

CHANNELS = {4: 6, 8: 5, 16: 3}


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(3)
    g = StyleGAN2Generator(16, 9, mapping_layers=2, style_dim=11, channels=CHANNELS, latent_avg=True).double()
    with torch.no_grad():
        g.latent_avg.copy_(torch.randn(11))
        for name, p in g.named_parameters():
            if p.ndim < 2 or name.endswith("rgb1.bias"):
                p.add_(torch.randn_like(p) * 0.3)  # biases and noise strengths that are zero would show nothing
    return g.eval()


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(4)
    d = StyleGAN2Discriminator(16, channels=CHANNELS).double()
    with torch.no_grad():
        for p in d.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return d.eval()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "network.pkl"


def write(kind, file, generator, critic):
    g, d = generator.state_dict(), critic.state_dict()
    raw = {k: 2 * t for k, t in g.items()}
    if kind == "torch":
        averaged = ada_of(g) | {"mapping.w_avg": g["latent_avg"]}
        write_torch_pickle(file, G=ada_of(raw), D=critic_of(d, 16, False), G_ema=averaged)
    else:
        averaged = tf_of(g) | {"dlatent_avg": g["latent_avg"], "synthesis/lod": torch.zeros(())}
        write_tf_pickle(
            file, network_tree(tf_of(raw)), network_tree(critic_of(d, 16, True), ()), network_tree(averaged)
        )


def assert_same(a, b, but=()):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if not name.endswith(but):
            assert torch.equal(tensor, b[name]), name


def convolved_up(x, kernel, taps):
    """Zeros between the pixels, then the true convolution with kernel * filter; centred, twice the size."""
    spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    spread[:, :, ::2, ::2] = x
    lowpass = torch.outer(taps, taps) / taps.sum() ** 2 * 4
    size = kernel.shape[-1]
    both = F.conv2d(kernel.reshape(-1, 1, size, size), lowpass.flip(0, 1)[None, None], padding=3)
    both = both.reshape(*kernel.shape[:2], size + 3, size + 3)
    full = F.conv2d(spread, both.flip(2, 3), padding=size + 2)
    cut = (full.shape[2] - spread.shape[2]) // 2
    return full[:, :, cut : cut + spread.shape[2], cut : cut + spread.shape[3]]


def equations(p, z, layers, resolution, scaled=True, labels=None):
    """Images of StyleGAN2 from its equations, a sample at a time, weights modulated as in eq. 1 and 3.

    scaled: whether demodulation adds its 1e-8 to the norm of the kernel divided by √fan-in, or of the kernel as it is.

    labels: of a conditional network, one for each sample; "embed" is in p then.

    p: "mapping{i}" and "{r}.up", "{r}.conv", "{r}.rgb" with parts, kernels as true convolution wants them.
    """
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=z.dtype)

    def lrelu(x):
        return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)

    images = []
    for number, sample in enumerate(z):
        w = sample / (sample.square().mean() + 1e-8).sqrt()
        if labels is not None:
            matrix = p["embed.weight"]
            c = matrix[:, labels[number]] / math.sqrt(matrix.shape[1]) + p["embed.bias"]
            w = torch.cat((w, c / (c.square().mean() + 1e-8).sqrt()))
        for i in range(layers):
            matrix, bias = p[f"mapping{i}.weight"], p[f"mapping{i}.bias"]
            w = lrelu(matrix @ w * (0.01 / math.sqrt(len(w))) + 0.01 * bias)

        def style(name, w=w):
            return p[f"{name}.affine"] @ w / math.sqrt(len(w)) + p[f"{name}.affine_bias"]

        def conv(x, name, up):
            fan_in = p[f"{name}.weight"][0].numel() if scaled else 1
            kernel = p[f"{name}.weight"] / math.sqrt(fan_in) * style(name)[None, :, None, None]
            kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
            y = convolved_up(x, kernel, taps) if up else F.conv2d(x, kernel.flip(2, 3), padding=1)
            return lrelu(y + p[f"{name}.strength"] * p[f"{name}.noise"] + p[f"{name}.bias"][:, None, None])

        def rgb(x, name):
            kernel = p[f"{name}.weight"] / math.sqrt(x.shape[1]) * style(name)[None, :, None, None]
            return F.conv2d(x, kernel) + p[f"{name}.bias"][:, None, None]

        x = conv(p["const"][None], "4.conv", False)
        image = rgb(x, "4.rgb")
        r = 8
        while r <= resolution:
            x = conv(conv(x, f"{r}.up", True), f"{r}.conv", False)
            one = torch.ones(1, 1, 1, 1, dtype=z.dtype)
            image = torch.cat([convolved_up(channel[None, None], one, taps) for channel in image[0]], 1)
            image = image + rgb(x, f"{r}.rgb")
            r *= 2
        images.append(image[0])
    return torch.stack(images)


def of_ada(s, layers):
    """The tensors of the PyTorch program, where an upsampling layer convolves and the others correlate."""
    p = {f"mapping{i}.{part}": s[f"mapping.fc{i}.{part}"] for i in range(layers) for part in ("weight", "bias")}
    p["const"] = s["synthesis.b4.const"]
    p |= {k.removeprefix("mapping."): t for k, t in s.items() if k.startswith("mapping.embed.")}
    for r in CHANNELS:
        for theirs, ours in (("conv0", "up"), ("conv1", "conv"), ("torgb", "rgb")):
            of = {k.split(f"b{r}.{theirs}.")[1]: t for k, t in s.items() if f".b{r}.{theirs}." in k}
            if not of:
                continue
            weight = of["weight"] if ours == "up" else of["weight"].flip(2, 3)
            p |= {f"{r}.{ours}.weight": weight, f"{r}.{ours}.bias": of["bias"]}
            p |= {f"{r}.{ours}.affine": of["affine.weight"], f"{r}.{ours}.affine_bias": of["affine.bias"]}
            if ours != "rgb":
                p |= {f"{r}.{ours}.strength": of["noise_strength"], f"{r}.{ours}.noise": of["noise_const"]}
    return p


def of_tf(s, layers):
    """The variables of TensorFlow's program, where every layer correlates."""
    p = {"const": s["synthesis/4x4/Const/const"][0]}
    if "mapping/LabelEmbed/weight" in s:
        p |= {"embed.weight": s["mapping/LabelEmbed/weight"].T, "embed.bias": s["mapping/LabelEmbed/bias"]}
    for i in range(layers):
        p[f"mapping{i}.weight"], p[f"mapping{i}.bias"] = s[f"mapping/Dense{i}/weight"].T, s[f"mapping/Dense{i}/bias"]
    for k, r in enumerate(CHANNELS):
        conv = "Conv" if r == 4 else "Conv1"
        for theirs, ours, number in (("Conv0_up", "up", 2 * k - 1), (conv, "conv", 2 * k), ("ToRGB", "rgb", None)):
            layer = f"synthesis/{r}x{r}/{theirs}"
            if f"{layer}/weight" not in s:
                continue
            p[f"{r}.{ours}.weight"] = s[f"{layer}/weight"].permute(3, 2, 0, 1).flip(2, 3)
            p[f"{r}.{ours}.bias"] = s[f"{layer}/bias"]
            p |= {
                f"{r}.{ours}.affine": s[f"{layer}/mod_weight"].T,
                f"{r}.{ours}.affine_bias": s[f"{layer}/mod_bias"] + 1,
            }
            if number is not None:
                p |= {
                    f"{r}.{ours}.strength": s[f"{layer}/noise_strength"],
                    f"{r}.{ours}.noise": s[f"synthesis/noise{number}"],
                }
    return p


@pytest.mark.parametrize("kind", ["torch", "tf"])
def test_the_networks_come_back(file, generator, critic, kind):
    write(kind, file, generator, critic)
    modules = set(sys.modules)
    g, d = load_generator(file), load_discriminator(file)
    assert set(sys.modules) == modules
    assert has_discriminator(file)
    assert (g.config, d.config) == (generator.config, critic.config)
    # A bias that went through "- 1 + 1", a kernel through "/ 4 * 4": the last bit may differ.
    assert_same(g.state_dict(), generator.state_dict(), ("modulation.bias", "kernel"))
    assert_same(d.state_dict(), critic.state_dict(), "kernel")
    for ours, theirs in ((g, generator), (d, critic)):
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-14, atol=1e-15)
    z = torch.randn(3, 9, dtype=torch.float64)
    images = generator(z, noise="constant")
    torch.testing.assert_close(g(z, noise="constant"), images, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(d(images), critic(images), rtol=1e-11, atol=1e-12)
    centre = generator.synthesis(generator.latent_avg.expand(3, generator.num_layers, -1), noise="constant")
    torch.testing.assert_close(g(z, truncation=0.0, noise="constant"), centre, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["torch", "tf"])
def test_images_are_those_of_the_equations(file, generator, critic, kind):
    write(kind, file, generator, critic)
    state = generator.state_dict()
    p = of_ada(ada_of(state), 2) if kind == "torch" else of_tf(tf_of(state), 2)
    z = torch.randn(3, 9, dtype=torch.float64)
    with torch.no_grad():
        images = load_generator(file)(z, noise="constant")
        torch.testing.assert_close(images, equations(p, z, 2, 16), rtol=1e-10, atol=1e-10)
        if kind == "torch":
            # Where that program adds the 1e-8: the kernel's norm is near fan-in there, 1 here.
            torch.testing.assert_close(images, equations(p, z, 2, 16, scaled=False), rtol=1e-7, atol=1e-7)


def assert_read_as(file, g, d):
    loaded_g, loaded_d = load_generator(file), load_discriminator(file)
    assert (loaded_g.config, loaded_d.config) == (g.config, d.config)
    z = torch.randn(2, 9, dtype=torch.float64)
    with torch.no_grad():
        images = g(z, noise="constant")
        torch.testing.assert_close(loaded_g(z, noise="constant"), images, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(loaded_d(images), d(images), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["torch", "tf"])
def test_residual_generators_and_skip_discriminators(file, kind):
    torch.manual_seed(5)
    g = StyleGAN2Generator(16, 9, mapping_layers=2, channels=CHANNELS, architecture="resnet", latent_avg=True).double()
    d = StyleGAN2Discriminator(16, channels=CHANNELS, architecture="skip").double()
    write(kind, file, g, d)
    assert_read_as(file, g, d)


def grown(tensors, prefix, layer, size):
    """As networks that grew are written: the layer of the images is numbered by the halvings from the highest
    resolution, and there is one, out of use, for a lower one."""
    own = {k.replace(f"{prefix}{size}x{size}/{layer}/", f"{prefix}{layer}_lod0/"): t for k, t in tensors.items()}
    lower = {k.replace("_lod0", "_lod1"): t + 1 for k, t in own.items() if "_lod0" in k}
    return own | lower | {f"{prefix}lod": torch.zeros(())}


@pytest.mark.parametrize("kind", ["torch", "tf", "tf that grew"])
def test_plain_networks(file, kind):
    torch.manual_seed(6)
    g = StyleGAN2Generator(16, 9, mapping_layers=2, channels=CHANNELS, architecture="orig", latent_avg=True).double()
    d = StyleGAN2Discriminator(16, channels=CHANNELS, architecture="orig").double()
    if kind == "tf that grew":
        averaged = grown(tf_of(g.state_dict()) | {"dlatent_avg": g.latent_avg}, "synthesis/", "ToRGB", 16)
        judge = grown(critic_of(d.state_dict(), 16, True), "", "FromRGB", 16)
        write_tf_pickle(file, network_tree(averaged), network_tree(judge, ()), network_tree(averaged))
    else:
        write(kind, file, g, d)
    assert_read_as(file, g, d)


def test_a_network_that_still_grows_is_named(file):
    d = StyleGAN2Discriminator(16, channels=CHANNELS, architecture="orig").double()
    judge = grown(critic_of(d.state_dict(), 16, True), "", "FromRGB", 16) | {"lod": torch.tensor(0.25)}
    write_tf_pickle(file, network_tree({}), network_tree(judge, ()), network_tree({}))
    with pytest.raises(ValueError, match=r"it is still growing \(lod is 0\.25\)"):
        load_discriminator(file)


@pytest.mark.parametrize("kept", [1, 100, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["torch", "tf"])
def test_truncated_pickles(file, generator, critic, kind, kept):
    write(kind, file, generator, critic)
    whole = file.read_bytes()
    file.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ValueError, match="is truncated, damaged or no file"):
        load_generator(file)
