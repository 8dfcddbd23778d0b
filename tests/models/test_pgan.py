"""Progressive GAN against its equations, written here again, and its public files, built from their key rules."""

import math

import pytest
import torch
from nvidia_files import named
from torch.nn import functional as F

from minegan_fast.layers import r1_penalty
from minegan_fast.models import PGANDiscriminator, PGANGenerator, load_discriminator, load_generator, save_model
from minegan_fast.models.layouts import find
from minegan_fast.models.layouts.pgan import cropped

WIDTHS = {4: 9, 8: 8, 16: 6, 32: 5}
PUBLIC = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64}


class _Config:
    """The class of that project's settings, which a file names and nobody else has."""

    def __init__(self, **settings):
        self.__dict__.update({"alpha": 0.0, "dimOutput": 3, **settings})


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def layers(names):
    """{key: shape} of {layer: shape of its weight}."""
    shapes = {f"{name}.module.weight": shape for name, shape in names.items()}
    return shapes | {f"{name}.module.bias": shape[:1] for name, shape in names.items()}


def zoo_generator(widths, latent=11, image_channels=3):
    w = list(widths.values())
    names = {"formatLayer": (16 * w[0], latent), "groupScale0.0": (w[0], w[0], 3, 3)}
    for s in range(len(w) - 1):
        names |= {f"scaleLayers.{s}.0": (w[s + 1], w[s], 3, 3), f"scaleLayers.{s}.1": (w[s + 1], w[s + 1], 3, 3)}
    return layers(names | {f"toRGBLayers.{s}": (image_channels, c, 1, 1) for s, c in enumerate(w)})


def zoo_discriminator(widths, image_channels=3, outputs=1):
    w = list(widths.values())
    names = {"groupScaleZero.0": (w[0], w[0] + 1, 3, 3), "groupScaleZero.1": (w[0], 16 * w[0])}
    for s in range(len(w) - 1):
        names |= {f"scaleLayers.{s}.0": (w[s + 1], w[s + 1], 3, 3), f"scaleLayers.{s}.1": (w[s], w[s + 1], 3, 3)}
    names |= {f"fromRGBLayers.{s}": (c, image_channels, 1, 1) for s, c in enumerate(w)}
    return layers(names | {"decisionLayer": (outputs, w[0])})


def filled(shapes):
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def old_names(state):
    return {name.replace(".module", ""): tensor for name, tensor in state.items()}


def build(state, role, **changes):
    """The network that the layout of such a file describes, with its tensors."""
    layout = find(state, role).layout
    model = layout.model(**(layout.config(state) | changes)).double()
    model.load_state_dict(layout.convert(state))
    return model


def scaled(p, name, x, kernel=None, act=True):
    weight, bias = p[f"{name}.module.weight"], p[f"{name}.module.bias"]
    y = x @ weight.T + bias if kernel is None else F.conv2d(x, weight, bias, padding=kernel // 2)
    y = y * math.sqrt(2 / weight[0].numel())
    return torch.where(y > 0, y, 0.2 * y) if act else y


def normalised(x):
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def doubled(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def halved(x):
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def reference_generator(p, z, scales, alpha):
    x = normalised(scaled(p, "formatLayer", normalised(z)).reshape(len(z), -1, 4, 4))
    x = normalised(scaled(p, "groupScale0.0", x, 3))
    images = [scaled(p, "toRGBLayers.0", x, 1, act=False)]
    for s in range(scales):
        x = normalised(scaled(p, f"scaleLayers.{s}.0", doubled(x), 3))
        x = normalised(scaled(p, f"scaleLayers.{s}.1", x, 3))
        images.append(scaled(p, f"toRGBLayers.{s + 1}", x, 1, act=False))
    return alpha * images[-1] + (1 - alpha) * doubled(images[-2]) if scales else images[-1]


def reference_outputs(p, x, scales, alpha, groups):
    below = scaled(p, f"fromRGBLayers.{scales - 1}", halved(x), 1) if scales else None
    x = scaled(p, f"fromRGBLayers.{scales}", x, 1)
    for s in reversed(range(scales)):
        x = halved(scaled(p, f"scaleLayers.{s}.1", scaled(p, f"scaleLayers.{s}.0", x, 3), 3))
        x = alpha * x + (1 - alpha) * below if s == scales - 1 else x
    deviation = []
    for group in groups:
        several = len(group) > 1
        value = (x[group].var(0, unbiased=True) + 1e-8).sqrt().mean() if several else torch.tensor(0.0)
        deviation += [value.expand(1, 4, 4)] * len(group)
    x = scaled(p, "groupScaleZero.0", torch.cat((x, torch.stack(deviation)), 1), 3)
    return scaled(p, "decisionLayer", scaled(p, "groupScaleZero.1", x.flatten(1)), act=False)


def test_public_layout_of_256_px():
    with torch.device("meta"):
        models = PGANGenerator(256), PGANDiscriminator(256)
    for model, rule, n in zip(models, (zoo_generator(PUBLIC, 512), zoo_discriminator(PUBLIC)), (42, 44), strict=True):
        assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == rule
        assert len(rule) == n


@pytest.mark.parametrize("style", [dict, old_names])
@pytest.mark.parametrize("image_channels", [1, 3])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("scales", [0, 1, 3])
def test_generator_is_the_documented_one(scales, alpha, image_channels, style):
    widths = dict(list(WIDTHS.items())[: scales + 1])
    p = filled(zoo_generator(widths, image_channels=image_channels))
    g = build(style(p), "generator", alpha=alpha)
    assert (g.resolution, g.latent_dim, g.num_classes, g.image_channels) == (4 << scales, 11, 0, image_channels)
    z = torch.randn(3, 11).double()
    assert relative(g(z), reference_generator(p, z, scales, alpha)) < 1e-10
    again = type(g)(**g.config)
    assert again.config == g.config
    assert again.alpha == alpha


@pytest.mark.parametrize("style", [dict, old_names])
@pytest.mark.parametrize(("image_channels", "outputs"), [(1, 1), (3, 5)])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("scales", [0, 1, 3])
def test_discriminator_is_the_documented_one(scales, alpha, image_channels, outputs, style):
    widths = dict(list(WIDTHS.items())[: scales + 1])
    p = filled(zoo_discriminator(widths, image_channels, outputs))
    d = build(style(p), "discriminator", alpha=alpha)
    assert (d.resolution, d.num_classes, d.image_channels) == (4 << scales, outputs - 1, image_channels)
    x = torch.randn(8, image_channels, d.resolution, d.resolution).double()
    for batch, groups in {8: [range(4), range(4, 8)], 6: [range(6)], 3: [range(3)], 1: [range(1)]}.items():
        expected = reference_outputs(p, x[:batch], scales, alpha, [list(g) for g in groups])
        assert relative(d.outputs(x[:batch]), expected) < 1e-10
        assert torch.equal(d(x[:batch]), d.outputs(x[:batch])[:, 0])
    alone = torch.cat([d.features(x[i : i + 1]) for i in range(8)])
    assert relative(d.features(x, group=1), alone) < 1e-12


def test_labels_follow_z_in_one_vector():
    p = filled(zoo_generator({4: 9, 8: 8}, latent=11 + 3))
    g = build(p, "generator", latent_dim=11, num_classes=3)
    assert g.class_dim == 3
    z, y = torch.randn(4, 11).double(), torch.tensor([2, 0, 1, 2])
    hot = torch.eye(3).double()[y]
    expected = reference_generator(p, torch.cat((z, hot), 1), 1, 1.0)
    assert relative(g(z, y), expected) < 1e-10
    assert torch.equal(g(z, hot), g(z, y))
    assert relative(build(p, "generator")(torch.cat((z, hot), 1)), expected) < 1e-10


@pytest.mark.parametrize("style", [dict, old_names])
def test_files_are_read_and_saved(tmp_path, style):
    p, q, raw = filled(zoo_generator(WIDTHS)), filled(zoo_discriminator(WIDTHS)), filled(zoo_generator(WIDTHS))
    content = {"config": _Config(), "netG": style(raw), "avgG": style(p), "netD": style(q)}
    with named("models.utils.config", "BaseConfig", _Config):
        torch.save(content, tmp_path / "a.pth")
    g, d = load_generator(tmp_path / "a.pth"), load_discriminator(tmp_path / "a.pth")
    save_model(tmp_path / "b.safetensors", g, d)
    z = torch.randn(2, 11).double()
    expected = reference_generator(p, z, 3, 1.0)
    for generator in (g, load_generator(tmp_path / "b.safetensors", family="pgan")):
        assert relative(generator(z), expected) < 1e-10
    critics = [f(expected) for f in (d, load_discriminator(tmp_path / "b.safetensors"))]
    assert torch.equal(*critics)


def zoo_file(path, scales=3, **settings):
    """(generator's tensors, discriminator's) of a file as that program saves it."""
    widths = dict(list(WIDTHS.items())[: scales + 1])
    p, q = filled(zoo_generator(widths)), filled(zoo_discriminator(widths))
    config = _Config(depthOtherScales=[*widths.values()][1:], leakyReluLeak=0.2, **settings)
    with named("models.utils.config", "BaseConfig", _Config):
        torch.save({"config": config, "netG": p, "avgG": p, "netD": q}, path)
    return p, q


# In that program alpha is the weight of the lower resolution, and the discriminator of 8 pixels leaves that out.
@pytest.mark.parametrize(("scales", "judged"), [(3, 0.75), (1, 1.0), (0, 1.0)])
def test_a_resolution_that_fades_in_is_read_at_its_alpha(tmp_path, scales, judged):
    p, q = zoo_file(tmp_path / "a.pt", scales, alpha=0.25)
    g, d = load_generator(tmp_path / "a.pt"), load_discriminator(tmp_path / "a.pt")
    assert (g.alpha, d.alpha) == (0.75 if scales else 1.0, judged)
    z = torch.randn(4, 11).double()
    images = reference_generator(p, z, scales, 0.75)
    assert relative(g(z), images) < 1e-10
    assert relative(d.outputs(images), reference_outputs(q, images, scales, judged, [[0, 1, 2, 3]])) < 1e-10
    save_model(tmp_path / "b.safetensors", g, d)
    assert torch.equal(load_generator(tmp_path / "b.safetensors")(z), g(z))


def test_a_lower_resolution_has_faded_in(tmp_path):
    p, _ = zoo_file(tmp_path / "a.pt", alpha=0.25)
    g, z = load_generator(tmp_path / "a.pt", resolution=16), torch.randn(4, 11).double()
    assert relative(g(z), reference_generator(p, z, 2, 1.0)) < 1e-10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, r"its alpha is 1\.5, and no number of 0 to 1"),
        ({"alpha": "much"}, "its alpha is 'much'"),
        ({"leakyReluLeak": 0.1}, r"leakyReluLeak is 0\.1, where networks read here have 0\.2"),
        ({"perChannelNormalization": False}, "perChannelNormalization is False"),
        ({"lossCriterion": "DCGAN"}, r"its images pass through tanh \(lossCriterion is DCGAN\)"),
    ],
)
def test_settings_of_other_networks_are_named(tmp_path, settings, message):
    content = {"netG": filled(zoo_generator(WIDTHS)), "config": settings}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        load_generator(tmp_path / "a.pt")


def test_lower_resolutions_of_a_file_are_networks_of_their_own():
    p, q = filled(zoo_generator(WIDTHS)), filled(zoo_discriminator(WIDTHS))
    g, d = build(cropped(old_names(p), 8), "generator"), build(cropped(q, 8), "discriminator")
    z = torch.randn(4, 11).double()
    images = reference_generator(p, z, 1, 1.0)
    assert relative(g(z), images) < 1e-10
    assert relative(d.outputs(images), reference_outputs(q, images, 1, 1.0, [[0, 1, 2, 3]])) < 1e-10
    assert cropped(p, None) == p
    for size in (64, 12, 2):
        with pytest.raises(ValueError, match=rf"holds the resolutions \[4, 8, 16, 32\], not {size}"):
            cropped(p, size)


def small(cls, resolution=16, **changes):
    arguments = {"latent_dim": 11} if cls is PGANGenerator else {}
    return cls(resolution, channel_base=64, channel_max=8, **(arguments | changes))


@pytest.mark.parametrize("resolution", [4, 16])
def test_networks_start_as_the_paper_says_and_train(resolution):
    g, d = small(PGANGenerator, resolution, num_classes=2), small(PGANDiscriminator, resolution, num_classes=2)
    for name, p in (*g.named_parameters(), *d.named_parameters()):
        assert abs(p.std() - 1) < 5 / math.sqrt(2 * p.numel()) if name.endswith("weight") else not p.any()
    before = {id(p): p.detach().clone() for net in (g, d) for p in net.parameters()}
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.99)) for net in (d, g)]
    y = torch.tensor([0, 1, 1, 0])
    for _ in range(3):
        real = torch.randn(4, 3, resolution, resolution)
        fake = g(torch.randn(4, 11), y)
        outputs = d.outputs(fake.detach())
        critic = F.softplus(-d(real)).mean() + F.softplus(outputs[:, 0]).mean() + r1_penalty(d, real)
        critic = critic + F.cross_entropy(outputs[:, 1:], y)
        miner = F.softplus(-d(fake)).mean()
        assert critic.isfinite()
        assert miner.isfinite()
        for loss, net, optimizer in zip((critic, miner), (d, g), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward(inputs=[*net.parameters()])
        for optimizer in optimizers:
            optimizer.step()
    moved = {name for net in (g, d) for name, p in net.named_parameters() if not torch.equal(p, before[id(p)])}
    top = int(math.log2(resolution)) - 2
    unused = {
        f"{kind}.{s}.module.{p}"
        for kind in ("toRGBLayers", "fromRGBLayers")
        for s in range(top)
        for p in ("weight", "bias")
    }
    assert moved == {name for net in (g, d) for name, _ in net.named_parameters()} - unused


def test_bfloat16_autocast_and_channels_last():
    # Pixel norm of very few channels divides by what may be near 0, which makes any rounding large.
    sizes = {"channel_base": 2048, "channel_max": 64, "alpha": 0.5}
    g, d = PGANGenerator(32, 11, **sizes), PGANDiscriminator(32, **sizes)
    z = torch.randn(4, 11)
    exact = g(z)
    with torch.autocast("cpu", torch.bfloat16):
        images = g(z)
        scores = d(images)
    assert images.dtype == scores.dtype == torch.bfloat16
    # bfloat16 rounds to 2^-9; the roundings on the way to a pixel, about 100 (8 layers of 12: operands, convolution,
    # bias and activation, and the norm's square, mean, root and product), add up like a random walk.
    assert relative(images.float(), exact) < 2**-9 * 100**0.5
    for gradient in torch.autograd.grad(scores.float().sum(), (*g.parameters(), *d.parameters()), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()
    g, d = (net.double().to(memory_format=torch.channels_last) for net in (g, d))
    images = g(z.double())
    assert relative(images, small_double(g)(z.double())) < 1e-12
    assert relative(d(images.contiguous(memory_format=torch.channels_last)), small_double(d)(images)) < 1e-12


def small_double(net):
    plain = type(net)(**net.config).double()
    plain.load_state_dict(net.state_dict())
    return plain.to(memory_format=torch.contiguous_format)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 2}, "power of two >= 4, got 2"),
        ({"resolution": 48}, "power of two >= 4, got 48"),
        ({"resolution": 8, "image_channels": 0}, "image_channels must be at least 1, got 0"),
        ({"resolution": 8, "num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"resolution": 8, "alpha": 1.5}, r"alpha must be in 0\.\.1, got 1\.5"),
        ({"resolution": 8, "channels": {16: 2}}, r"names the resolutions \[16\]"),
    ],
)
@pytest.mark.parametrize("cls", [PGANGenerator, PGANDiscriminator])
def test_wrong_sizes_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def test_wrong_inputs_are_named():
    g, labelled, d = small(PGANGenerator, 8), small(PGANGenerator, 8, num_classes=3), small(PGANDiscriminator, 8)
    z = torch.randn(2, 11)
    for call, message in (
        (lambda: g(z[:, :9]), r"z must have shape \[B, 11\], got \[2, 9\]"),
        (lambda: g(z[0]), r"z must have shape \[B, 11\], got \[11\]"),
        (lambda: g(z, torch.tensor([0, 0])), r"y must be None for a generator with num_classes=0, got \[2\]"),
        (lambda: labelled(z), r"y must be labels \[2\] or vectors \[2, 3\] .* got None"),
        (lambda: labelled(z, torch.zeros(2, 4)), r"y must be labels \[2\] or vectors \[2, 3\] .* got \[2, 4\]"),
        (lambda: PGANGenerator(8, latent_dim=0), "latent_dim must be at least 1, got 0"),
        (lambda: d(torch.zeros(2, 1, 8, 8)), r"\[B >= 1, 3, 8, 8\], got \[2, 1, 8, 8\]"),
        (lambda: d(torch.zeros(0, 3, 8, 8)), r"\[B >= 1, 3, 8, 8\], got \[0, 3, 8, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
