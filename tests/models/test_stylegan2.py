"""StyleGAN2 against its equations, written here again: per-sample weights, grouped convolutions, filters by taps."""

import math

import pytest
import torch
from torch.nn import functional as F

from minegan_fast.layers import path_length_penalty, r1_penalty
from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator

SMALL = {"channel_base": 128, "channel_max": 12}
CONFIG_F = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64, 1024: 32}


def generator(resolution=16, latent_dim=10, **kwargs):
    """A float64 generator whose biases and noise strengths, zero at the start, are not."""
    sizes = {"style_dim": 14, "mapping_layers": 3} | SMALL
    return perturbed(StyleGAN2Generator(resolution, latent_dim, **(sizes | kwargs)))


def critic(resolution=16, **kwargs):
    return perturbed(StyleGAN2Discriminator(resolution, **(SMALL | kwargs)))


def perturbed(model):
    model = model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "noise" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def rosinality_generator(widths, dim, image_channels=3, mapping=8):
    """{key: shape} of the public layout; widths {resolution: channels} from 4 up, dim = latent = style."""
    shapes = {f"style.{i}.{p}": s for i in range(1, mapping + 1) for p, s in (("weight", (dim, dim)), ("bias", (dim,)))}

    def modulated(name, cin, cout, kernel):
        shapes[f"{name}.conv.weight"] = (1, cout, cin, kernel, kernel)
        shapes[f"{name}.conv.modulation.weight"], shapes[f"{name}.conv.modulation.bias"] = (cin, dim), (cin,)

    def styled(name, cin, cout):
        modulated(name, cin, cout, 3)
        shapes[f"{name}.noise.weight"], shapes[f"{name}.activate.bias"] = (1,), (cout,)

    def to_rgb(name, cin):
        modulated(name, cin, image_channels, 1)
        shapes[f"{name}.bias"] = (1, image_channels, 1, 1)

    shapes["input.input"], shapes["noises.noise_0"] = (1, widths[4], 4, 4), (1, 1, 4, 4)
    styled("conv1", widths[4], widths[4])
    to_rgb("to_rgb1", widths[4])
    for j, r in enumerate(sorted(widths)[1:]):
        styled(f"convs.{2 * j}", widths[r // 2], widths[r])
        styled(f"convs.{2 * j + 1}", widths[r], widths[r])
        to_rgb(f"to_rgbs.{j}", widths[r])
        shapes[f"convs.{2 * j}.conv.blur.kernel"] = shapes[f"to_rgbs.{j}.upsample.kernel"] = (4, 4)
        shapes[f"noises.noise_{2 * j + 1}"] = shapes[f"noises.noise_{2 * j + 2}"] = (1, 1, r, r)
    return shapes


def rosinality_discriminator(widths, image_channels=3):
    top = max(widths)
    shapes = {"convs.0.0.weight": (widths[top], image_channels, 1, 1), "convs.0.1.bias": (widths[top],)}
    for i, r in enumerate(sorted(widths)[:0:-1], 1):
        cin, cout, name = widths[r], widths[r // 2], f"convs.{i}"
        shapes |= {f"{name}.conv1.0.weight": (cin, cin, 3, 3), f"{name}.conv1.1.bias": (cin,)}
        shapes |= {f"{name}.conv2.1.weight": (cout, cin, 3, 3), f"{name}.conv2.2.bias": (cout,)}
        shapes |= {f"{name}.skip.1.weight": (cout, cin, 1, 1)}
        shapes |= {f"{name}.conv2.0.kernel": (4, 4), f"{name}.skip.0.kernel": (4, 4)}
    c = widths[4]
    shapes |= {"final_conv.0.weight": (c, c + 1, 3, 3), "final_conv.1.bias": (c,)}
    shapes |= {"final_linear.0.weight": (c, 16 * c), "final_linear.0.bias": (c,)}
    return shapes | {"final_linear.1.weight": (1, c), "final_linear.1.bias": (1,)}


@pytest.mark.parametrize(
    ("resolution", "tensors", "parameters"), [(256, (135, 50), (30.03, 28.86)), (1024, (171, 64), (30.37, 29.01))]
)
def test_layout_of_config_f(resolution, tensors, parameters):
    widths = {r: c for r, c in CONFIG_F.items() if r <= resolution}
    with torch.device("meta"):
        models = StyleGAN2Generator(resolution), StyleGAN2Discriminator(resolution)
    for model, expected, n, millions in zip(
        models, (rosinality_generator(widths, 512), rosinality_discriminator(widths)), tensors, parameters, strict=True
    ):
        assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
        assert len(expected) == n
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("image_channels", [1, 3])
@pytest.mark.parametrize("widths", [{4: 7, 8: 3}, {4: 1, 8: 1, 16: 1}, {4: 5, 8: 9, 16: 6, 32: 2}])
def test_layout_of_other_sizes(widths, image_channels):
    arguments = {"channels": widths, "image_channels": image_channels}
    g = StyleGAN2Generator(max(widths), 6, mapping_layers=2, **arguments)
    d = StyleGAN2Discriminator(max(widths), **arguments)
    assert {k: tuple(v.shape) for k, v in g.state_dict().items()} == rosinality_generator(widths, 6, image_channels, 2)
    assert {k: tuple(v.shape) for k, v in d.state_dict().items()} == rosinality_discriminator(widths, image_channels)
    images = g(torch.randn(3, 6))
    assert images.shape == (3, image_channels, max(widths), max(widths))
    assert d(images).shape == (3,)
    assert type(g)(**g.config).config == g.config
    assert type(d)(**d.config).config == d.config


def filtered(x, before, after, gain=1.0):
    """Correlates every channel with (1, 3, 3, 1) ⊗ (1, 3, 3, 1) / 64 · gain, tap by tap."""
    taps = (1, 3, 3, 1)
    x = F.pad(x, (before, after, before, after))
    h, w = x.shape[2] - 3, x.shape[3] - 3
    return (
        sum(a * b * x[:, :, i : i + h, j : j + w] for i, a in enumerate(taps) for j, b in enumerate(taps)) / 64 * gain
    )


def zeros_between(x):
    b, c, h, w = x.shape
    return torch.stack((x, torch.zeros_like(x)), -1).reshape(b, c, h, 2 * w).repeat_interleave(2, 2) * (
        torch.arange(2 * h, dtype=x.dtype) % 2 == 0
    )[:, None].to(x.dtype)


def dense(p, name, x, lr_mul=1.0):
    return x @ (p[f"{name}.weight"] * lr_mul / math.sqrt(x.shape[1])).T + p[f"{name}.bias"] * lr_mul


def lrelu(x):
    return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def modulated_conv(p, name, x, w, upsample=False, demodulate=True):
    b, cin = x.shape[:2]
    weight = p[f"{name}.weight"]
    cout, k = weight.shape[1], weight.shape[3]
    weight = weight / math.sqrt(cin * k * k) * dense(p, f"{name}.modulation", w)[:, None, :, None, None]
    if demodulate:
        weight = weight / (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    if upsample:  # a transposed convolution: zeros between the pixels, full padding, the kernel turned round
        x, weight = zeros_between(x)[:, :, :-1, :-1], weight.flip(3, 4)
    padding = 2 if upsample else k // 2
    y = F.conv2d(x.reshape(1, b * cin, *x.shape[2:]), weight.reshape(b * cout, cin, k, k), padding=padding, groups=b)
    y = y.view(b, cout, *y.shape[2:])
    return filtered(y, 1, 1, gain=4) if upsample else y


def reference_mapping(p, z):
    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for i in range(1, 1 + sum(k.startswith("style.") and k.endswith("bias") for k in p)):
        w = lrelu(dense(p, f"style.{i}", w, lr_mul=0.01))
    return w


def reference_synthesis(p, w, noise):
    def styled(name, x, k, layer, upsample=False):
        y = modulated_conv(p, f"{name}.conv", x, w[:, layer], upsample)
        y = y + p[f"{name}.noise.weight"] * noise[k]
        return lrelu(y + p[f"{name}.activate.bias"][:, None, None])

    def rgb(name, x, layer):
        return modulated_conv(p, f"{name}.conv", x, w[:, layer], demodulate=False) + p[f"{name}.bias"]

    x = styled("conv1", p["input.input"].repeat(len(w), 1, 1, 1), 0, 0)
    image = rgb("to_rgb1", x, 1)
    for j in range((w.shape[1] - 2) // 2):
        x = styled(f"convs.{2 * j}", x, 2 * j + 1, 2 * j + 1, upsample=True)
        x = styled(f"convs.{2 * j + 1}", x, 2 * j + 2, 2 * j + 2)
        image = filtered(zeros_between(image), 2, 1, gain=4) + rgb(f"to_rgbs.{j}", x, 2 * j + 3)
    return image


def reference_stddev(x, size):
    """Sample i shares its group with i ± B / size, ...; its statistic is the mean over all features of the std."""
    groups = len(x) // size
    stats = [(x[i % groups :: groups].var(0, unbiased=False) + 1e-8).sqrt().mean() for i in range(len(x))]
    return torch.cat((x, torch.stack(stats)[:, None, None, None].expand(-1, 1, *x.shape[2:])), 1)


def reference_critic(p, x, size):
    def conv(name, x, padding=0, stride=1):
        weight = p[f"{name}.weight"]
        return F.conv2d(x, weight / math.sqrt(weight[0].numel()), padding=padding, stride=stride)

    def act(name, x):
        return lrelu(x + p[f"{name}.bias"][:, None, None])

    x = act("convs.0.1", conv("convs.0.0", x))
    for i in range(1, int(math.log2(x.shape[2])) - 1):
        y = act(f"convs.{i}.conv1.1", conv(f"convs.{i}.conv1.0", x, padding=1))
        y = act(f"convs.{i}.conv2.2", conv(f"convs.{i}.conv2.1", filtered(y, 2, 2), stride=2))
        x = (y + conv(f"convs.{i}.skip.1", filtered(x, 1, 1), stride=2)) / math.sqrt(2)
    x = act("final_conv.1", conv("final_conv.0", reference_stddev(x, size), padding=1))
    return dense(p, "final_linear.1", lrelu(dense(p, "final_linear.0", x.flatten(1))))[:, 0]


def tensors_of(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same_gradients(model, ours, theirs):
    names, parameters = zip(*model.named_parameters(), strict=True)
    pairs = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (ours, theirs))
    for name, a, b in zip(names, *pairs, strict=True):
        a, b = (torch.zeros(()).double() if g is None else g for g in (a, b))
        assert (a - b).norm() <= 1e-10 * b.norm(), name


@pytest.mark.parametrize("resolution", [8, 16, 32])
@pytest.mark.parametrize("image_channels", [1, 3])
def test_generator_follows_the_equations(resolution, image_channels):
    g = generator(resolution, image_channels=image_channels, channels={4: 11, 8: 7})
    p, z = tensors_of(g), torch.randn(3, 10).double()
    noise = [p[f"noises.noise_{k}"] for k in range(g.num_layers - 1)]
    images, w = g(z, noise="constant", return_latents=True)
    expected_w = reference_mapping(p, z)[:, None].repeat(1, g.num_layers, 1)
    expected = reference_synthesis(p, expected_w, noise)
    assert relative(w, expected_w) < 1e-12
    assert relative(images, expected) < 1e-10
    weights = torch.randn_like(expected)
    assert_same_gradients(g, (images * weights).sum(), (expected * weights).sum())


def test_path_length_has_the_second_order_of_the_equations():
    g = generator()
    p, z = tensors_of(g), torch.randn(2, 10).double()
    noise = [p[f"noises.noise_{k}"] for k in range(g.num_layers - 1)]
    w = reference_mapping(p, z)[:, None].repeat(1, g.num_layers, 1)
    losses = []
    for images, latents in (g(z, noise="constant", return_latents=True), (reference_synthesis(p, w, noise), w)):
        seeded = torch.Generator().manual_seed(0)
        losses.append(path_length_penalty(images, latents, mean=0.1, generator=seeded)[0])
    assert relative(*losses) < 1e-10
    assert_same_gradients(g, *losses)


@pytest.mark.parametrize(("batch", "group"), [(8, 4), (4, 4), (6, 3), (2, 2), (5, 1), (1, 1)])
def test_critic_follows_the_equations(batch, group):
    d = critic(channels={16: 5, 4: 9})
    p, x = tensors_of(d), torch.randn(batch, 3, 16, 16).double()
    scores, expected = d(x), reference_critic(p, x, group)
    assert scores.shape == (batch,)
    assert relative(scores, expected) < 1e-10
    assert_same_gradients(d, scores.square().sum(), expected.square().sum())


def test_r1_has_the_second_order_of_the_equations():
    d = critic(image_channels=1)
    p, x = tensors_of(d), torch.randn(4, 1, 16, 16).double()
    losses = [r1_penalty(d, x), r1_penalty(lambda x: reference_critic(p, x, 4), x)]
    assert relative(*losses) < 1e-10
    assert_same_gradients(d, *losses)


def test_initial_values_are_those_of_the_paper():
    for model in (StyleGAN2Generator(8, 64, channel_max=64), StyleGAN2Discriminator(8, channel_max=64)):
        for name, p in model.named_parameters():
            if name.endswith("bias") or "noise" in name:
                assert (p == (1 if "modulation" in name else 0)).all(), name
            else:
                std = p.std() * (0.01 if name.startswith("style") else 1)
                assert abs(std - 1) < 4 / (2 * p.numel()) ** 0.5, name  # 4 standard errors


def test_style_mixing_takes_the_second_style_from_the_crossover_on():
    g = generator()
    z1, z2 = torch.randn(2, 3, 10).double()
    w1, w2 = g.mapping(z1), g.mapping(z2)
    for crossover in range(g.num_layers + 1):
        images, w = g((z1, z2), crossover=crossover, noise="none", return_latents=True)
        assert torch.equal(w[:, :crossover], w1[:, None].expand(-1, crossover, -1))
        assert torch.equal(w[:, crossover:], w2[:, None].expand(-1, g.num_layers - crossover, -1))
        assert torch.equal(images, g.synthesis(w, "none"))
    assert torch.equal(g((z1, z2), crossover=g.num_layers, noise="none"), g(z1, noise="none"))
    by_layer = w1[:, None].repeat(1, g.num_layers, 1), w2
    assert torch.equal(g(by_layer, crossover=2, latents=True, noise="none"), g((z1, z2), crossover=2, noise="none"))


def test_a_drawn_crossover_leaves_each_style_a_layer_and_reaches_all_layers():
    g = generator(8)
    z1, z2 = torch.randn(2, 1, 10).double()
    w1 = g.mapping(z1)
    drawn = set()
    for _ in range(60):
        w = g((z1, z2), return_latents=True)[1]
        drawn.add(int((w == w1[:, None]).all(2).sum()))
    assert drawn == set(range(1, g.num_layers))


def test_truncation():
    g = generator()
    z = torch.randn(3, 10).double()
    mean = g.mean_latent()
    assert mean.shape == (1, 14)
    draws = torch.randn(4096, 10, generator=torch.Generator().manual_seed(0)).double()
    assert relative(mean, reference_mapping(tensors_of(g), draws).mean(0, keepdim=True)) < 1e-12
    assert torch.equal(g(z, truncation=1.0, noise="none"), g(z, noise="none"))
    mean_image = g(mean, latents=True, noise="none")
    assert relative(g(z, truncation=0.0, noise="none"), mean_image.expand(3, -1, -1, -1)) < 1e-12
    w = g(z, truncation=0.7, noise="none", return_latents=True)[1]
    assert relative(w, (mean + 0.7 * (g.mapping(z) - mean))[:, None].expand_as(w)) < 1e-12


def test_noise_modes():
    g = generator()
    z = torch.randn(2, 10).double()
    maps = [getattr(g.noises, f"noise_{k}") for k in range(g.num_layers - 1)]
    constant, none = g(z, noise="constant"), g(z, noise="none")
    assert torch.equal(constant, g(z, noise="constant"))
    assert torch.equal(constant, g(z, noise=maps))
    assert torch.equal(none, g(z, noise=[torch.zeros_like(m) for m in maps]))
    torch.manual_seed(1)
    drawn = [torch.randn(2, *m.shape[1:]).double() for m in maps]
    a, b = g(z), g(z)
    assert relative(a, b) > 1e-3
    assert min(relative(a, constant), relative(constant, none)) > 1e-3
    one = torch.randn(1, 10).double().expand(2, -1)
    images = g(one, noise=drawn)
    assert relative(images[0], images[1]) > 1e-3
    shared = g(one, noise=[m[:1] for m in drawn])
    assert relative(shared, images[:1].expand_as(shared)) < 1e-12


def test_random_noise_follows_the_global_seed_and_results_repeat():
    g, d = generator().float(), critic().float()
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        images = g((torch.randn(3, 10), torch.randn(3, 10)))
        gradients = torch.autograd.grad(d(images).sum(), (*g.parameters(), *d.parameters()))
        results.append((images, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_latents_go_round_and_carry_gradients():
    g = generator()
    z = torch.randn(2, 10).double()
    images, w = g(z, noise="none", return_latents=True)
    assert w.shape == (2, g.num_layers, 14)
    assert torch.equal(images, g(w, latents=True, noise="none"))
    assert torch.equal(images, g(g.mapping(z), latents=True, noise="none"))
    (gradient,) = torch.autograd.grad(images.sum(), w)
    assert (gradient.abs().sum((0, 2)) > 0).all()


def test_bfloat16_autocast_stays_close_and_trains():
    g, d = generator(32).float(), critic(32).float()
    z = torch.randn(4, 10)
    with torch.autocast("cpu", torch.bfloat16):
        images = g(z, noise="constant")
        scores = d(images)
    exact = g(z, noise="constant")
    assert images.dtype == scores.dtype == torch.bfloat16
    # bfloat16 rounds to 2^-9; the roundings on the way to a pixel, about 100 (mapping 12, 7 layers of 10, 4 images of
    # 5), add up like a random walk.
    assert relative(images.float(), exact) < 2**-9 * 100**0.5
    for gradient in torch.autograd.grad(scores.float().sum(), (*g.parameters(), *d.parameters()), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


def test_critic_reads_channels_last_images_alike():
    d, x = critic(), torch.randn(4, 3, 16, 16).double()
    last = x.to(memory_format=torch.channels_last)
    assert relative(d(last), d(x)) < 1e-12
    losses = [r1_penalty(d, last), r1_penalty(d, x)]
    assert_same_gradients(d, *losses)


def test_generator_compiles():
    g = generator(8).float()
    z = torch.randn(2, 10)
    compiled = torch.compile(g, backend="aot_eager")
    torch.testing.assert_close(compiled(z, noise="constant"), g(z, noise="constant"))
    gradients = [torch.autograd.grad(f(z, noise="none").square().sum(), g.conv1.conv.weight)[0] for f in (compiled, g)]
    torch.testing.assert_close(*gradients)


def test_neurons_name_existing_rows_once():
    for model in (generator(), critic()):
        seen = set()
        for module_name, module in model.named_modules():
            for neuron in getattr(module, "neuron_parameters", list)():
                sizes = set()
                for name, axis in neuron:
                    sizes.add(module.get_parameter(name).shape[axis])
                    full_name = f"{module_name}.{name}"
                    assert full_name not in seen
                    seen.add(full_name)
                assert len(sizes) == 1
        weights = {n for n, p in model.named_parameters() if p.ndim > 2}
        assert weights <= seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 4}, "power of two >= 8, got 4"),
        ({"resolution": 48}, "power of two >= 8, got 48"),
        ({"resolution": 32.0}, "power of two >= 8, got 32.0"),
        ({"resolution": 16, "channels": {12: 3}}, r"names the resolutions \[12\]"),
        ({"resolution": 16, "channels": {8: 0}}, "at least one channel"),
        ({"resolution": 16, "image_channels": 0}, "image_channels must be at least 1"),
        ({"resolution": 16, "latent_dim": 0}, "latent_dim must be at least 1"),
        ({"resolution": 16, "latent_dim": 8, "style_dim": 0}, "style_dim must be at least 1"),
        ({"resolution": 16, "mapping_layers": 0}, "mapping_layers must be at least 1"),
    ],
)
def test_wrong_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        StyleGAN2Generator(**arguments)
    if arguments.keys() <= {"resolution", "channels", "image_channels"}:
        with pytest.raises(ValueError, match=message):
            StyleGAN2Discriminator(**arguments)


def test_wrong_inputs_are_named():
    g, d = generator(8), critic(8)
    z = torch.randn(2, 10).double()
    w = g.mapping(z)
    maps = [torch.zeros(1, 1, r, r) for r in (4, 8, 8)]
    for call, message in (
        (lambda: g(z[:, :9]), r"z must have shape \[B, 10\], got \[2, 9\]"),
        (lambda: g(z[0]), r"z must have shape \[B, 10\], got \[10\]"),
        (lambda: g(z, latents=True), r"w must have shape \[B, 4, 14\], got \[2, 4, 10\]"),
        (lambda: g(w[:, None], latents=True), r"w must have shape \[B, 4, 14\], got \[2, 1, 14\]"),
        (lambda: g.synthesis(w), r"w must have shape \[B, 4, 14\], got \[2, 14\]"),
        (lambda: g((z, z), crossover=5), r"crossover in 0\.\.4"),
        (lambda: g((z, z), crossover=-1), r"crossover in 0\.\.4"),
        (lambda: g((z, z[:1])), r"two z of one shape .* got \[2, 10\], \[1, 10\]"),
        (lambda: g(z, crossover=2), "needs a pair"),
        (lambda: g(z, noise="off"), 'noise must be "random", "constant", "none" or a list of maps, got \'off\''),
        (lambda: g(z, noise=maps[:2]), "must hold 3 maps, one per styled convolution, got 2"),
        (lambda: g(z, noise=[maps[0], *maps[:2]]), r"map 1 must have shape \[1 or 2, 1, 8, 8\], got \[1, 1, 4, 4\]"),
        (lambda: d(torch.zeros(2, 3, 16, 16)), r"\[B >= 1, 3, 8, 8\], got \[2, 3, 16, 16\]"),
        (lambda: d(torch.zeros(2, 1, 8, 8)), r"\[B >= 1, 3, 8, 8\], got \[2, 1, 8, 8\]"),
        (lambda: d(torch.zeros(0, 3, 8, 8)), r"\[B >= 1, 3, 8, 8\], got \[0, 3, 8, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.filterwarnings("ignore")  # a trace warns of each comparison
@pytest.mark.parametrize("trains", [False, True])
def test_a_traced_critic_computes_anew(trains):
    D = StyleGAN2Discriminator(8, channel_base=64).eval().requires_grad_(trains)
    x, other = torch.randn(2, 4, 3, 8, 8)
    with torch.no_grad():
        traced = torch.jit.trace(D, x, check_trace=False)
        assert torch.equal(traced(other), D(other))
