"""BigGAN-deep against its equations and its public key list."""

import itertools

import pytest
import torch
from biggan_equations import GENERATOR, attend, doubled, random_state
from torch.nn import functional as F

from minegan_fast.models import BigGANDeepGenerator
from minegan_fast.models.layouts.biggan_deep import LAYOUTS

(LAYOUT,) = LAYOUTS
TINY = {"resolution": 32, "latent_dim": 7, "class_dim": 6, "num_classes": 5, "channel_width": 2, "attention": [16]}


def keys(resolution, ch, z, embedding, classes, attended, steps):
    """{key: shape} of pytorch-pretrained-biggan; `attended` the size of the map that attention follows."""
    c = [ch * m for m in GENERATOR[resolution]]
    shapes = {"embeddings.weight": (embedding, classes)}

    def normalised(name, *shape, bias=True):
        shapes[f"{name}.weight_orig"], shapes[f"{name}.weight_u"] = shape, shape[:1]
        shapes[f"{name}.weight_v"] = (torch.Size(shape[1:]).numel(),)
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    normalised("generator.gen_z", 16 * c[0], z + embedding)
    layer = itertools.count()
    for i, (cin, cout) in enumerate(itertools.pairwise(c)):
        for out in (cin, cout):
            name, inner = f"generator.layers.{next(layer)}", cin // 4
            for k, n in enumerate((cin, inner, inner, inner)):
                shapes[f"{name}.bn_{k}.running_means"] = shapes[f"{name}.bn_{k}.running_vars"] = (steps, n)
                normalised(f"{name}.bn_{k}.scale", n, z + embedding, bias=False)
                normalised(f"{name}.bn_{k}.offset", n, z + embedding, bias=False)
            for k, shape in enumerate(((inner, cin, 1), (inner, inner, 3), (inner, inner, 3), (out, inner, 1))):
                normalised(f"{name}.conv_{k}", *shape, shape[-1])
        if 8 << i == attended:
            name = f"generator.layers.{next(layer)}"
            shapes[f"{name}.gamma"] = (1,)
            parts = (("theta", cout // 8, cout), ("phi", cout // 8, cout), ("g", cout // 2, cout))
            for part, out, inner in (*parts, ("o_conv", cout, cout // 2)):
                normalised(f"{name}.snconv1x1_{part}", out, inner, 1, 1, bias=False)
    for part, shape in (("weight", ()), ("bias", ()), ("running_means", (steps,)), ("running_vars", (steps,))):
        shapes[f"generator.bn.{part}"] = (*shape, c[-1])
    normalised("generator.conv_to_rgb", c[-1], c[-1], 3, 3)
    return shapes


def generator(state, z, embedding, truncation, image_channels=3):
    """The equations; σ = uᵀ W v of what is stored, and the statistics between two rows as the project mixes them."""

    def weight(name):
        w = state[f"{name}.weight_orig"]
        return w / torch.einsum("o,ok,k->", state[f"{name}.weight_u"], w.reshape(len(w), -1), state[f"{name}.weight_v"])

    def conv(name, x):
        w = weight(name)
        return F.conv2d(x, w, state.get(f"{name}.bias"), padding=w.shape[-1] // 2)

    def norm(name, x):
        tables = state[f"{name}.running_means"], state[f"{name}.running_vars"]
        at = truncation * (len(tables[0]) - 1)
        low, rest = int(at), at - int(at)
        mean, var = ((t[low] if rest < 1e-9 else t[low] * rest + t[low + 1] * (1 - rest)) for t in tables)
        return (x - mean[:, None, None]) / (var[:, None, None] + 1e-4).sqrt()

    def conditional(name, x):
        gain, shift = (c @ weight(f"{name}.{part}").T for part in ("scale", "offset"))
        return ((1 + gain[..., None, None]) * norm(name, x) + shift[..., None, None]).clamp(min=0)

    c = torch.cat((z, embedding), 1)
    x = c @ weight("generator.gen_z").T + state["generator.gen_z.bias"]
    x = torch.stack([row.reshape(16, -1).T.reshape(-1, 4, 4) for row in x])
    layers = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("generator.layers."))
    doubles = itertools.cycle((False, True))
    for i in range(layers):
        name = f"generator.layers.{i}"
        if f"{name}.gamma" in state:
            theta, phi, g, o = (
                lambda t, p=p: conv(f"{name}.snconv1x1_{p}", t)  # noqa: B023
                for p in ("theta", "phi", "g", "o_conv")
            )
            x = attend(x, theta, phi, g, state[f"{name}.gamma"], o)
            continue
        y, up = conv(f"{name}.conv_0", conditional(f"{name}.bn_0", x)), next(doubles)
        y = conditional(f"{name}.bn_1", y)
        y = conv(f"{name}.conv_1", doubled(y) if up else y)
        y = conv(f"{name}.conv_3", conditional(f"{name}.bn_3", conv(f"{name}.conv_2", conditional(f"{name}.bn_2", y))))
        x = x[:, : y.shape[1]]
        x = y + (doubled(x) if up else x)
    affine = (state[f"generator.bn.{p}"][:, None, None] for p in ("weight", "bias"))
    x = (next(affine) * norm("generator.bn", x) + next(affine)).clamp(min=0)
    return conv("generator.conv_to_rgb", x)[:, :image_channels].tanh()


def tiny(**changes):
    torch.manual_seed(0)
    return BigGANDeepGenerator(**TINY | {"steps": 5} | changes)


def random_network(resolution=32, ch=2, attended=16, steps=5):
    """(model, state): built as a reader of files does it, from the key list."""
    torch.manual_seed(0)
    state = random_state(keys(resolution, ch, 7, 6, 5, attended, steps))
    for name, u in state.items():
        # What a file holds: unit vectors near the leading singular ones.
        if name.endswith("weight_u"):
            m = state[name[:-1] + "orig"].flatten(1)
            left, _, right = torch.linalg.svd(m, full_matrices=False)
            state[name] = F.normalize(left[:, 0] + 0.1 * F.normalize(u, dim=0), dim=0)
            state[name[:-1] + "v"] = F.normalize(right[0] + 0.1 * torch.randn_like(right[0]), dim=0)
    assert set(LAYOUT.signature) <= state.keys()
    with torch.device("meta"):
        model = LAYOUT.model(**LAYOUT.config(state))
    model = model.double().to_empty(device="cpu").eval()
    model.load_state_dict(LAYOUT.convert(state))
    return model, state


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("resolution", "count"), [(128, 506), (256, 602), (512, 698)])
def test_published_networks_have_the_published_keys(resolution, count):
    shapes = keys(resolution, 128, 128, 128, 1000, 64, 51)
    assert len(shapes) == count
    with torch.device("meta"):
        model = BigGANDeepGenerator(resolution)
        config = LAYOUT.config({k: torch.empty(s) for k, s in shapes.items()})
        assert config.items() <= model.config.items()
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shapes


@pytest.mark.parametrize(("resolution", "ch", "attended"), [(32, 2, 16), (64, 4, None), (128, 4, 64), (256, 4, 8)])
def test_network_is_its_equations(resolution, ch, attended):
    model, state = random_network(resolution, ch, attended)
    assert (model.resolution, model.latent_dim, model.class_dim, model.num_classes) == (resolution, 7, 6, 5)
    with torch.device("meta"):
        assert LAYOUT.model(**model.config).config == model.config
    z, labels = torch.randn(2, 7).double(), torch.tensor([4, 0])
    embedding = state["embeddings.weight"].T[labels]
    expected = generator(state, z, embedding, 1.0)
    with torch.no_grad():
        images = model(z, labels)
        assert torch.equal(model(z, embedding), images)
    assert images.shape == (2, 3, resolution, resolution)
    assert images.std() > 0.01
    assert relative(images, expected) < 1e-10


@pytest.mark.parametrize("truncation", [0.0, 0.25, 0.3, 0.6, 0.99])
def test_truncation_chooses_the_statistics(truncation):
    model, state = random_network()
    z, embedding = torch.randn(2, 7).double(), torch.randn(2, 6).double()
    images = model(z, embedding, truncation=truncation)
    assert relative(images, generator(state, z, embedding, truncation)) < 1e-10
    assert relative(images, model(z, embedding)) > 1e-3


def test_grey_images_are_the_first_of_the_outputs():
    model = tiny(image_channels=1).double().eval()
    z, embedding = torch.randn(2, 7).double(), torch.randn(2, 6).double()
    expected = generator(model.state_dict(), z, embedding, 1.0, image_channels=1)
    assert expected.shape == (2, 1, 32, 32)
    assert relative(model(z, embedding), expected) < 1e-10


def test_new_networks_are_orthogonal_and_know_their_sigma():
    model = tiny().eval()
    for name, weight in model.named_parameters():
        if name.endswith("weight_orig") or name == "embeddings.weight":
            m = weight.detach().flatten(1)
            m = m if m.shape[0] <= m.shape[1] else m.T
            torch.testing.assert_close(m @ m.T, torch.eye(len(m)), atol=1e-5, rtol=0)
    for module in model.modules():
        if hasattr(module, "weight_u"):
            torch.testing.assert_close(module.normalised(), module.weight_orig, atol=1e-5, rtol=1e-5)


def test_power_iteration_in_train_mode_and_training():
    model = tiny()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, (0.0, 0.999))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    target = torch.rand(4, 3, 32, 32)
    losses = []
    for _ in range(3):
        images = model(torch.randn(4, 7), torch.randint(5, (4,)))
        losses.append((images - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.stack(losses).isfinite().all()
    assert losses[-1] < losses[0]
    still = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
    assert still == {k for k, v in before.items() if "running" in k or (k.endswith("_u") and len(v) == 1)}
    layer = model.generator.layers[0].conv_1
    for _ in range(300):
        layer.normalised()
    sigma = torch.linalg.matrix_norm(layer.weight_orig.detach().flatten(1), 2)
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.normalised().detach().flatten(1), 2), torch.tensor(1.0))
    torch.testing.assert_close((layer.weight_orig / layer.normalised()).mean(), sigma)


def test_standing_statistics():
    model = tiny(steps=3).double().train()
    batches = [(torch.randn(4, 7).double(), torch.randint(5, (4,))) for _ in range(2)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.standing_statistics(batches)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if "running" in k}
    assert all(module.training for module in model.modules())
    model.eval()
    norm = model.generator.layers[0].bn_0

    def first_map(z, y):
        return model.generator.gen_z(torch.cat((z, model.embed(y)), 1)).unflatten(1, (16, 8))

    for row, truncation in ((1, 0.5), (2, 1.0)):
        maps = [first_map(truncation * z, y) for z, y in batches]
        torch.testing.assert_close(norm.running_means[row], torch.stack([m.mean((0, 1)) for m in maps]).mean(0))
        torch.testing.assert_close(norm.running_vars[row], torch.stack([m.var((0, 1)) for m in maps]).mean(0))
    # Of one batch alone: behind the last norm that batch then has mean 0.
    model.standing_statistics(batches[:1])
    seen = []
    model.generator.bn.register_forward_hook(lambda module, arguments, y: seen.append(y))
    model(*batches[0])
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), torch.zeros(8).double(), atol=1e-10, rtol=0)


def test_autocast():
    model = tiny().eval()
    z, y = torch.randn(2, 7), torch.tensor([0, 3])
    with torch.no_grad():
        exact = model(z, y)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(z, y)
    # bfloat16 has 8 bits; some thirty layers
    assert 1e-5 < relative(rounded.float(), exact) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny(steps=1), "steps must be at least 2"),
        (lambda: tiny(image_channels=9), "cannot be taken from 8"),
        (lambda: tiny(channels=[8, 8, 9, 8]), "no more than it takes"),
        (lambda: tiny(channel_width=1), "attention divides"),
        (lambda: BigGANDeepGenerator(96), "resolution must be one of"),
        (lambda: tiny()(torch.randn(2, 7), torch.tensor([0, 1]), truncation=1.5), r"truncation must lie in 0\.\.1"),
        (lambda: tiny()(torch.randn(2, 8), torch.tensor([0, 1])), r"\[B, 7\], got \[2, 8\]"),
        (lambda: tiny()(torch.randn(2, 7), F.one_hot(torch.tensor([0, 1]), 5).float()), r"\[B, 6\], got \[2, 5\]"),
        (lambda: tiny()(torch.randn(2, 7), torch.tensor([0, -1])), r"0\.\.4, got -1\.\.0"),
        (lambda: tiny()(torch.randn(2, 7), torch.tensor([0])), "one batch"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
