"""StyleGAN against its equations, written here again, and its public files, built from their key rules."""

import math

import pytest
import torch
from torch.nn import functional as F

from minegan_fast.layers import r1_penalty
from minegan_fast.models import (
    StyleGANDiscriminator,
    StyleGANGenerator,
    convert,
    load_discriminator,
    load_generator,
    save_model,
)
from minegan_fast.models.layouts import find

WIDTHS = {4: 9, 8: 8, 16: 6, 32: 5}
PUBLIC = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def layer(name, *shape):
    return {f"{name}.weight_orig": shape, f"{name}.bias": shape[:1]}


def blur(name, channels):
    return {f"{name}.weight": (channels, 1, 3, 3), f"{name}.weight_flip": (channels, 1, 3, 3)}


def rosinality_generator(widths, latent=512, style=512, mapping=8, image_channels=3, fused_from=128):
    shapes = {"generator.progression.0.conv1.input": (1, widths[4], 4, 4)}
    for k in range(mapping):
        shapes |= layer(f"style.{2 * k + 1}.linear", style, style if k else latent)
    for i, (r, c) in enumerate(widths.items()):
        block = f"generator.progression.{i}"
        if r >= fused_from:
            shapes |= {f"{block}.conv1.0.weight": (widths[r // 2], c, 3, 3), f"{block}.conv1.0.bias": (c,)}
            shapes |= blur(f"{block}.conv1.1", c)
        elif r > 4:
            shapes |= layer(f"{block}.conv1.1.conv", c, widths[r // 2], 3, 3) | blur(f"{block}.conv1.2", c)
        shapes |= layer(f"{block}.conv2.conv", c, c, 3, 3)
        for k in (1, 2):
            shapes |= {f"{block}.noise{k}.weight_orig": (1, c, 1, 1)}
            shapes |= layer(f"{block}.adain{k}.style.linear", 2 * c, style)
        shapes |= layer(f"generator.to_rgb.{i}.conv", image_channels, c, 1, 1)
    return shapes


def rosinality_discriminator(widths, image_channels=3, activate=True, fused_from=128):
    shapes = {}
    for i, (r, c) in enumerate(reversed(widths.items())):
        cout = widths.get(r // 2, c)
        shapes |= layer(f"progression.{i}.conv1.0.conv", cout, c if r > 4 else c + 1, 3, 3)
        if r == 4:
            shapes |= layer(f"progression.{i}.conv2.0.conv", c, c, 4, 4)
        elif r >= fused_from:
            shapes |= {f"progression.{i}.conv2.1.weight": (cout, cout, 3, 3), f"progression.{i}.conv2.1.bias": (cout,)}
        else:
            shapes |= layer(f"progression.{i}.conv2.1.conv", cout, cout, 3, 3)
        shapes |= blur(f"progression.{i}.conv2.0", cout) if r > 4 else {}
        shapes |= layer(f"from_rgb.{i}.0.conv" if activate else f"from_rgb.{i}.conv", c, image_channels, 1, 1)
    return shapes | layer("linear.linear", 1, widths[4])


def filled(shapes):
    state = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    taps = torch.tensor([1.0, 2.0, 1.0]).double() / 4
    filters = [name for name, shape in shapes.items() if shape[1:] == (1, 3, 3)]
    return state | {name: torch.outer(taps, taps).repeat(shapes[name][0], 1, 1, 1) for name in filters}


def build(state, role, **changes):
    """The network that the layout of such a file describes, with its tensors."""
    layout = find(state, role).layout
    model = layout.model(**(layout.config(state) | changes)).double()
    model.load_state_dict(layout.convert(state))
    return model


def lrelu(x):
    return torch.where(x > 0, x, 0.2 * x)


def dense(p, name, x):
    return x @ p[f"{name}.weight_orig"].T * math.sqrt(2 / x.shape[1]) + p[f"{name}.bias"]


def conv(p, name, x):
    weight = p[f"{name}.weight_orig"]
    scale = math.sqrt(2 / weight[0].numel())
    padding = {1: 0, 3: 1, 4: 0}[weight.shape[2]]
    return F.conv2d(x, weight * scale, p[f"{name}.bias"], padding=padding)


def spread(weight, fan_in):
    """[a, b, 3, 3] -> [a, b, 4, 4]: the mean of its four shifts."""
    wide = torch.zeros(*weight.shape[:2], 4, 4).double()
    for i in (0, 1):
        for j in (0, 1):
            wide[:, :, i : i + 3, j : j + 3] += weight / 4 * math.sqrt(2 / (9 * fan_in))
    return wide


def filtered(x):
    """Every pixel with its neighbours, weighted (1, 2, 1) / 4 along each axis; zeros outside."""
    x = F.pad(x, (1, 1, 1, 1))
    x = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
    return (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4


def doubled(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def halved(x):
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def reference_mapping(p, z):
    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for k in range(sum(name.startswith("style.") and name.endswith("bias") for name in p)):
        w = lrelu(dense(p, f"style.{2 * k + 1}.linear", w))
    return w


def reference_synthesis(p, w, noise, alpha=1.0):
    images, x = [], p["generator.progression.0.conv1.input"].repeat(len(w), 1, 1, 1)
    for i, drawn in enumerate(noise):
        block = f"generator.progression.{i}"
        if f"{block}.conv1.0.weight" in p:
            weight = spread(p[f"{block}.conv1.0.weight"], x.shape[1])
            x = F.conv_transpose2d(x, weight, p[f"{block}.conv1.0.bias"], stride=2, padding=1)
            x = filtered(x)
        elif i:
            x = filtered(conv(p, f"{block}.conv1.1.conv", doubled(x)))
        for k in (1, 2):
            x = conv(p, f"{block}.conv2.conv", x) if k == 2 else x
            x = lrelu(x + p[f"{block}.noise{k}.weight_orig"] * math.sqrt(2 / x.shape[1]) * drawn)
            scale, shift = dense(p, f"{block}.adain{k}.style.linear", w[:, 2 * i + k - 1])[:, :, None, None].chunk(2, 1)
            centred = x - x.mean((2, 3), keepdim=True)
            x = scale * centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt() + shift
        images.append(conv(p, f"generator.to_rgb.{i}.conv", x))
    return alpha * images[-1] + (1 - alpha) * doubled(images[-2]) if len(images) > 1 else images[-1]


def reference_critic(p, x, alpha=1.0):
    activate = "from_rgb.0.0.conv.bias" in p

    def read(i, x):
        return lrelu(conv(p, f"from_rgb.{i}.0.conv", x)) if activate else conv(p, f"from_rgb.{i}.conv", x)

    last = int(math.log2(x.shape[2])) - 2
    below = read(1, halved(x)) if last else None
    x = read(0, x)
    for i in range(last):
        x = filtered(lrelu(conv(p, f"progression.{i}.conv1.0.conv", x)))
        if f"progression.{i}.conv2.1.weight" in p:
            weight = spread(p[f"progression.{i}.conv2.1.weight"], x.shape[1])
            x = F.conv2d(x, weight, p[f"progression.{i}.conv2.1.bias"], stride=2, padding=1)
        else:
            x = halved(conv(p, f"progression.{i}.conv2.1.conv", x))
        x = lrelu(x)
        x = alpha * x + (1 - alpha) * below if i == 0 else x
    deviation = (x.var(0, unbiased=False) + 1e-8).sqrt().mean().expand(len(x), 1, 4, 4)
    x = lrelu(conv(p, f"progression.{last}.conv1.0.conv", torch.cat((x, deviation), 1)))
    return dense(p, "linear.linear", lrelu(conv(p, f"progression.{last}.conv2.0.conv", x)).flatten(1))[:, 0]


def first(widths, stages):
    return dict(list(widths.items())[:stages])


def maps(stages, batch=3):
    return [torch.randn(batch, 1, 4 << i, 4 << i).double() for i in range(stages)]


@pytest.mark.parametrize("activate", [True, False])
def test_public_layout_of_1024_px(activate):
    with torch.device("meta"):
        models = StyleGANGenerator(1024), StyleGANDiscriminator(1024, from_rgb_activate=activate)
    rules = rosinality_generator(PUBLIC), rosinality_discriminator(PUBLIC, activate=activate)
    for model, rule, n in zip(models, rules, (139, 72), strict=True):
        assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == rule
        assert len(rule) == n


@pytest.mark.parametrize(("stages", "fused_from", "image_channels"), [(1, 128, 3), (2, 8, 1), (4, 16, 3), (4, 128, 1)])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_generator_is_the_documented_one(stages, fused_from, image_channels, alpha):
    widths = first(WIDTHS, stages)
    p = filled(rosinality_generator(widths, 11, 7, 3, image_channels, fused_from))
    g = build(p, "generator", alpha=alpha)
    assert (g.resolution, g.latent_dim, g.style_dim, g.num_classes) == (2 << stages, 11, 7, 0)
    assert (g.image_channels, g.num_layers) == (image_channels, 2 * stages)
    z, noise = torch.randn(3, 11).double(), maps(stages)
    w = reference_mapping(p, z)[:, None].repeat(1, 2 * stages, 1)
    images, latents = g(z, noise=noise, return_latents=True)
    assert relative(latents, w) < 1e-10
    assert relative(images, reference_synthesis(p, w, noise, alpha)) < 1e-10
    again = type(g)(**g.config)
    assert again.config == g.config
    assert again.alpha == alpha


@pytest.mark.parametrize("activate", [True, False])
@pytest.mark.parametrize(("stages", "fused_from", "image_channels"), [(1, 128, 3), (2, 8, 1), (4, 16, 3), (4, 128, 1)])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_discriminator_is_the_documented_one(stages, fused_from, image_channels, alpha, activate):
    p = filled(rosinality_discriminator(first(WIDTHS, stages), image_channels, activate, fused_from))
    d = build(p, "discriminator", alpha=alpha)
    assert (d.resolution, d.image_channels, d.num_classes) == (2 << stages, image_channels, 0)
    x = torch.randn(6, image_channels, d.resolution, d.resolution).double()
    for batch in (1, 4, 6):
        assert relative(d(x[:batch]), reference_critic(p, x[:batch], alpha)) < 1e-10
    alone = torch.cat([d.features(image[None]) for image in x])
    assert relative(d.features(x, group=1), alone) < 1e-12
    assert type(d)(**d.config).config == d.config


def untrained(state):
    """The state as training leaves it that has not reached the highest of four resolutions."""
    block = "generator.progression.3." if "generator.to_rgb.0.conv.bias" in state else "progression.0."
    zero = {n for n in state if n.startswith(block) and "adain" not in n and ("noise" in n or n.endswith("bias"))}
    assert len(zero) in (2, 4)
    return state | {name: torch.zeros_like(state[name]) for name in zero}


@pytest.mark.parametrize("activate", [True, False])
def test_files_of_all_resolutions_give_the_trained_ones(tmp_path, activate):
    p = untrained(filled(rosinality_generator(WIDTHS, 11, 11, 2, fused_from=16)))
    raw = untrained(filled(rosinality_generator(WIDTHS, 11, 11, 2, fused_from=16)))
    q = untrained(filled(rosinality_discriminator(WIDTHS, activate=activate, fused_from=16)))
    torch.save({"generator": raw, "discriminator": q, "g_running": p, "g_optimizer": {}}, tmp_path / "train.model")
    torch.save(p, tmp_path / "running.model")
    g, d = load_generator(tmp_path / "train.model"), load_discriminator(tmp_path / "train.model")
    save_model(tmp_path / "own.safetensors", g, d)
    z, noise = torch.randn(2, 11).double(), maps(3, 1)
    images = reference_synthesis(p, reference_mapping(p, z)[:, None].repeat(1, 6, 1), noise)
    for file in ("train.model", "running.model", "own.safetensors"):
        assert relative(load_generator(tmp_path / file, family="stylegan")(z, noise=noise), images) < 1e-10
    below = {n.replace(f".{i}.", f".{i - 1}.", 1): q[n] for n in q for i in range(1, 4) if f".{i}." in n[:14]}
    below |= {name: q[name] for name in q if name.startswith("linear")}
    for critic in (d, load_discriminator(tmp_path / "own.safetensors")):
        assert relative(critic(images), reference_critic(below, images)) < 1e-10


def test_a_resolution_can_be_asked_for(tmp_path):
    p = untrained(filled(rosinality_generator(WIDTHS, 11, 11, 2)))
    q = untrained(filled(rosinality_discriminator(WIDTHS)))
    for state, load in ((p, load_generator), (q, load_discriminator)):
        torch.save(state, tmp_path / "a.model")
        assert load(tmp_path / "a.model").resolution == 16
        for size in (4, 8, 16, 32):
            assert load(tmp_path / "a.model", resolution=size).resolution == size
        for size in (64, 12):
            with pytest.raises(ValueError, match=rf"holds the resolutions \[4, 8, 16, 32\], not {size}"):
                load(tmp_path / "a.model", resolution=size)
        save_model(tmp_path / "own", load(tmp_path / "a.model"))
        assert load(tmp_path / "own", resolution=16).resolution == 16
        with pytest.raises(ValueError, match=r"of 16 px, which has no other resolution; got 8"):
            load(tmp_path / "own", resolution=8)
        torch.save({n: t * 0 if "noise" in n or "bias" in n else t for n, t in state.items()}, tmp_path / "a.model")
        assert load(tmp_path / "a.model").resolution == 32
    torch.save({"generator": p, "discriminator": q}, tmp_path / "a.model")
    convert(tmp_path / "a.model", tmp_path / "b.safetensors", resolution=8)
    assert (
        load_generator(tmp_path / "b.safetensors").resolution
        == load_discriminator(tmp_path / "b.safetensors").resolution
        == 8
    )


def small(cls, resolution=16, **changes):
    arguments = {"latent_dim": 11, "style_dim": 7, "mapping_layers": 2} if cls is StyleGANGenerator else {}
    net = cls(resolution, channel_base=64, channel_max=8, fused_from=16, **(arguments | changes)).double()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("bias") or "noise" in name or name.endswith("input"):
                p += 0.5 * torch.randn_like(p)
    return net


def test_styles_mix_and_are_truncated():
    g = small(StyleGANGenerator)
    z1, z2, noise = *torch.randn(2, 3, 11).double(), maps(3)
    w1, w2 = g.mapping(z1)[:, None].expand(-1, 6, -1), g.mapping(z2)[:, None].expand(-1, 6, -1)
    for crossover in range(7):
        images = g((z1, z2), crossover=crossover, noise=noise)
        assert torch.equal(images, g.synthesis(torch.cat((w1[:, :crossover], w2[:, crossover:]), 1), noise))
    assert torch.equal(g((z1, z2), crossover=2, noise=noise), g((w1, w2), crossover=2, noise=noise, latents=True))
    mean = g.mean_latent(samples=4096)
    assert mean.shape == (1, 7)
    drawn = torch.randn(4096, 11, generator=torch.Generator().manual_seed(0)).double()
    assert relative(mean, reference_mapping(dict(g.named_parameters()), drawn).mean(0, keepdim=True)) < 1e-12
    assert relative(g(z1, truncation=0.7, noise=noise), g.synthesis(mean + 0.7 * (w1 - mean), noise)) < 1e-12


def test_noise_and_constant():
    g = small(StyleGANGenerator)
    z = torch.randn(1, 11).double().expand(2, -1)
    drawn = maps(3, 2)
    torch.manual_seed(3)
    random = g(z)
    torch.manual_seed(3)
    assert torch.equal(random, g(z))
    assert relative(random[0], random[1]) > 1e-3
    fixed = g(z, noise="constant")
    assert torch.equal(fixed, g(z, noise="constant"))
    assert relative(fixed[0], fixed[1]) < 1e-12
    nothing = g(z, noise="none")
    assert relative(nothing, g(z, noise=[m * 0 for m in drawn])) < 1e-12
    assert min(relative(random, fixed), relative(fixed, nothing)) > 1e-3
    shared = g(z, noise=[m[:1] for m in drawn])
    assert relative(shared, g(z, noise=drawn)[:1].expand_as(shared)) < 1e-12

    own = g.learned_constant
    assert own.shape == (1, 8, 4, 4)
    assert torch.equal(g(z, noise="none", constant=own.detach()), nothing)
    others = torch.randn(2, 8, 4, 4).double()
    images = g(z, noise="none", constant=others)
    for i in (0, 1):
        assert relative(images[i], g(z, noise="none", constant=others[i : i + 1])[i]) < 1e-12
    assert relative(images[0], images[1]) > 1e-3
    leaf = others[:1].requires_grad_()
    (gradient,) = torch.autograd.grad(g(z, noise="none", constant=leaf).square().sum(), leaf)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("resolution", [4, 16])
def test_networks_start_as_the_paper_says_and_train(resolution):
    sizes = {"channel_base": 64, "channel_max": 8, "fused_from": 16}
    g = StyleGANGenerator(resolution, 11, mapping_layers=2, **sizes)
    d = StyleGANDiscriminator(resolution, **sizes)
    for name, p in (*g.named_parameters(), *d.named_parameters()):
        if "noise" in name or (name.endswith("bias") and "adain" not in name):
            assert not p.any()
        elif name.endswith("bias"):
            assert torch.equal(p, torch.arange(len(p)).lt(len(p) // 2).float())
        elif name.endswith("input"):
            assert (p == 1).all()
        else:
            assert abs(p.std() - 1) < 5 / math.sqrt(2 * p.numel())
    before = {id(p): p.detach().clone() for net in (g, d) for p in net.parameters()}
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.99)) for net in (d, g)]
    for _ in range(3):
        real = torch.randn(4, 3, resolution, resolution)
        fake = g((torch.randn(4, 11), torch.randn(4, 11)))
        critic = F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean() + r1_penalty(d, real)
        miner = F.softplus(-d(fake)).mean()
        assert critic.isfinite()
        assert miner.isfinite()
        for loss, net, optimizer in zip((critic, miner), (d, g), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward(inputs=[*net.parameters()])
        for optimizer in optimizers:
            optimizer.step()
    names = {name: p for net in (g, d) for name, p in net.named_parameters()}
    unmoved = {name for name, p in names.items() if torch.equal(p, before[id(p)])}
    top = int(math.log2(resolution)) - 2
    lower = [f"generator.to_rgb.{i}." for i in range(top)] + [f"from_rgb.{i + 1}." for i in range(top)]
    assert unmoved == {name for name in names if name.startswith(tuple(lower))}


def test_bfloat16_autocast_and_channels_last():
    sizes = {"channel_base": 1024, "channel_max": 32, "fused_from": 16, "alpha": 0.5}
    g, d = StyleGANGenerator(32, 11, mapping_layers=3, **sizes), StyleGANDiscriminator(32, **sizes)
    g.learned_constant.data.normal_()
    z = torch.randn(4, 11)
    exact = g(z, noise="constant")
    with torch.autocast("cpu", torch.bfloat16):
        images = g(z, noise="constant")
        scores = d(images)
    assert images.dtype == scores.dtype == torch.bfloat16
    # bfloat16 rounds to 2^-9; the roundings on the way to a pixel, about 100 (mapping 9, 8 layers of 10, images 5), add
    # up like a random walk.
    assert relative(images.float(), exact) < 2**-9 * 100**0.5
    for gradient in torch.autograd.grad(scores.float().sum(), (*g.parameters(), *d.parameters()), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        g, d = (net.double().to(memory_format=layout) for net in (g, d))
        images = g(z.double(), noise="constant").contiguous(memory_format=layout)
        loss = d(images).sum() + r1_penalty(d, images)
        results.append((images, *torch.autograd.grad(loss, [*d.progression.parameters()])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 2}, "power of two >= 4, got 2"),
        ({"resolution": 48}, "power of two >= 4, got 48"),
        ({"resolution": 8, "image_channels": 0}, "image_channels must be at least 1, got 0"),
        ({"resolution": 8, "alpha": -0.5}, r"alpha must be in 0\.\.1, got -0\.5"),
        ({"resolution": 8, "channels": {16: 2}}, r"names the resolutions \[16\]"),
        ({"resolution": 8, "style_dim": 0}, "style_dim must be at least 1, got 0"),
        ({"resolution": 8, "mapping_layers": 0}, "mapping_layers must be at least 1, got 0"),
    ],
)
def test_wrong_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        StyleGANGenerator(**arguments)
    if not {"style_dim", "mapping_layers"} & arguments.keys():
        with pytest.raises(ValueError, match=message):
            StyleGANDiscriminator(**arguments)


def test_wrong_inputs_are_named():
    g, d = small(StyleGANGenerator, 8), small(StyleGANDiscriminator, 8)
    z = torch.randn(2, 11).double()
    w = g.mapping(z)
    for call, message in (
        (lambda: g(z[:, :9]), r"z must have shape \[B, 11\], got \[2, 9\]"),
        (lambda: g(z, latents=True), r"w must have shape \[B, 4, 7\], got \[2, 4, 11\]"),
        (lambda: g.synthesis(w), r"w must have shape \[B, 4, 7\], got \[2, 7\]"),
        (lambda: g((z, z), crossover=5), r"crossover in 0\.\.4"),
        (lambda: g((z, z[:1])), r"two z of one shape .* got \[2, 11\], \[1, 11\]"),
        (lambda: g(z, crossover=2), "needs a pair"),
        (lambda: g(z, noise="off"), 'noise must be "random", "constant", "none" or a list of maps, got \'off\''),
        (lambda: g(z, noise=maps(1)), "must hold 2 maps, one per resolution, got 1"),
        (lambda: g(z, noise=[*maps(1, 1)] * 2), r"map of 8 px must have shape \[1 or 2, 1, 8, 8\], got \[1, 1, 4, 4\]"),
        (lambda: g(z, constant=torch.zeros(3, 8, 4, 4)), r"constant must have shape \[1 or 2, 8, 4, 4\], got \[3, "),
        (lambda: d(torch.zeros(2, 1, 8, 8)), r"\[B >= 1, 3, 8, 8\], got \[2, 1, 8, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
