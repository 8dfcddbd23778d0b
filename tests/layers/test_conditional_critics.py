"""Critics that take more than images: labels, embeddings, maps; in every way that a script hands them to a penalty."""

import copy
import functools

import pytest
import torch
from torch import nn

from minegan_fast import SparseFinetuner
from minegan_fast.layers import LazyPenalty, dragan_penalty, gradient_penalty, r1_penalty
from minegan_fast.models import BigGANDiscriminator
from minegan_fast.ops import interpolate


class Projection(nn.Module):
    """A projection critic (Miyato and Koyama, 2018), of labels or of embeddings [B, 6]."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Softplus(), nn.Conv2d(6, 6, 3))
        self.score, self.table = nn.Linear(6, 1), nn.Embedding(5, 6)

    def forward(self, x, y, sign=1.0):
        h = self.body(x).tanh().sum((2, 3))
        y = y if y.is_floating_point() else self.table(y)
        return sign * (self.score(h)[:, 0] + (y * h).sum(1))


X, LABELS = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([4, 0, 2, 2])


def projection(dtype=torch.float64):
    torch.manual_seed(1)
    return Projection().to(dtype)


def biggan(training):
    torch.manual_seed(0)
    D = BigGANDiscriminator(32, num_classes=5, channel_width=8, attention=[16]).double()
    D(torch.randn(2, 3, 32, 32).double(), LABELS[:2])  # its vectors of spectral norms are no longer those of the start
    return D.train(training)


PENALTIES = {
    "r1": (r1_penalty, lambda x: x, lambda norms: norms.square()),
    "zero centred": (
        lambda D, x, **options: gradient_penalty(D, x, x.flip(0), 0.3, torch.Generator().manual_seed(3), **options),
        lambda x: interpolate(x, x.flip(0), generator=torch.Generator().manual_seed(3)),
        lambda norms: (norms - 0.3).square(),
    ),
    "dragan": (
        lambda D, x, **options: dragan_penalty(D, x, 0.8, 0.0, torch.Generator().manual_seed(3), **options),
        lambda x: x,
        lambda norms: (norms - 0.8).square(),
    ),
}
WAYS = {
    "condition": lambda penalty, D, x, y: penalty(D, x, condition=y),
    "tuple": lambda penalty, D, x, y: penalty(D, x, condition=(y,)),
    "lambda": lambda penalty, D, x, y: penalty(lambda x: D(x, y), x),
    "partial": lambda penalty, D, x, y: penalty(functools.partial(D, y=y), x),
    "lazy": lambda penalty, D, x, y: LazyPenalty(penalty, 1, 1.0)(3, D, x, condition=y),
}


def plain(penalty, D, x, y):
    """By autograd alone."""
    _, at, value = PENALTIES[penalty]
    leaf = at(x).clone().requires_grad_()
    (g,) = torch.autograd.grad(D(leaf, y).sum(), leaf, create_graph=True)
    return value(g.flatten(1).norm(dim=1)).mean()


def gradients(value, D):
    """Of the penalty by all weights, and along a fixed direction of these once more."""
    parameters = [p for p in D.parameters() if p.requires_grad]
    first = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True, retain_graph=True)
    generator = torch.Generator().manual_seed(4)
    along = sum((g * torch.randn(g.shape, generator=generator).to(g)).sum() for g in first if g is not None)
    second = torch.autograd.grad(along, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for part in (first, second)
            for p, g in zip(parameters, part, strict=True)]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("make", [projection, lambda: biggan(False), lambda: biggan(True)], ids=["", "biggan", "train"])
def test_projection_critics_to_second_order(make, penalty, way):
    D = make()
    twin, x = copy.deepcopy(D), X if isinstance(D, Projection) else torch.randn(4, 3, 32, 32).double()
    value = WAYS[way](PENALTIES[penalty][0], D, x, LABELS)
    expected = plain(penalty, twin, x, LABELS)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    got, want = gradients(value, D), gradients(expected, twin)
    assert any(g.any() for g in want[len(want) // 2 :])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.detach().abs().max()) + 1e-15)
    assert all(torch.equal(a, b) for a, b in zip(D.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_held_projection_critic(way):
    D = biggan(False)
    twin, x = copy.deepcopy(D), torch.randn(4, 3, 32, 32).double()
    ft = SparseFinetuner(D)
    ft.select({"embed.weight": [0, 2], "linear.weight": [0], "blocks.1.0.conv1.weight": [3]})
    WAYS[way](r1_penalty, D, x, LABELS).backward()
    plain("r1", twin, x, LABELS).backward()
    gradients = dict(zip(D.parameters(), (q.grad for q in twin.parameters()), strict=True))
    for leaf in ft.parameters():
        whole = gradients[leaf.link.weight]
        if whole is None:  # a bias that the penalty does not depend on
            assert leaf.grad is None or not leaf.grad.any()
        else:
            torch.testing.assert_close(leaf.grad, whole[leaf.link.rows], rtol=1e-8, atol=1e-12)
    assert sum(leaf.grad is not None for leaf in ft.parameters()) >= 3


def test_a_condition_gets_a_gradient():
    D, y = projection(), torch.randn(4, 6).double().requires_grad_()
    (got,) = torch.autograd.grad(r1_penalty(D, X, y), y)
    (want,) = torch.autograd.grad(plain("r1", D, X, y), y)
    torch.testing.assert_close(got, want)
    assert got.any()


def test_a_tuple_holds_all_further_arguments():
    D = projection()
    assert r1_penalty(D, X, (LABELS, 2.0)).item() == pytest.approx(4 * r1_penalty(D, X, LABELS).item())


# Every way to reach a critic of bfloat16. Another network, of float32, is always near.

OTHER = nn.Linear(3, 3)


class Trainer:
    def __init__(self, D, y):
        self.G, self.D, self.y = OTHER, D, y

    def __call__(self, x):
        return self.D(x, self.y)

    def score(self, x):
        return self.D(x, self.y)


class Lightning(nn.Module):
    def __init__(self, D, y):
        super().__init__()
        self.G, self.D, self.y = OTHER, D, y

    def score(self, x):
        return self.D(x, self.y)


def through_a_function(D, y):
    def score(x):
        return D(x, y)

    return lambda x: score(x)


def through_a_default(D, y):
    return lambda x, D=D: D(x, y)


def beside_another(D, y):
    return lambda x: D(x, y) + 0 * OTHER.weight.sum().to(x.dtype)


def of_an_attribute(holder):
    return lambda x: holder.D(x, holder.y)


CRITICS = {
    "lambda": lambda D, y: lambda x: D(x, y),
    "partial": lambda D, y: functools.partial(D, y=y),
    "partial of a function": lambda D, y: functools.partial(lambda D, x: D(x, y), D),
    "bound": lambda D, y: functools.partial(D.forward, y=y),
    "function of a function": through_a_function,
    "default": through_a_default,
    "list": lambda D, y: lambda x, networks=[D]: networks[0](x, y),
    "dict": lambda D, y: (lambda networks: lambda x: networks["D"](x, y))({"D": D}),
    "callable": Trainer,
    "method": lambda D, y: Trainer(D, y).score,
    "method of a module": lambda D, y: Lightning(D, y).score,
    "attribute": lambda D, y: of_an_attribute(Trainer(D, y)),
    "attribute of a module": lambda D, y: of_an_attribute(Lightning(D, y)),
    "beside another": beside_another,
    "cat": lambda D, y: lambda x: D(torch.cat([x, x], 1)[:, :3], y),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CRITICS)
def test_half_precision_images_meet_weights_of_theirs(name, dtype):
    D, images = projection(dtype), X.to(dtype)
    y = torch.randn(4, 6).to(dtype)
    want = r1_penalty(D, images, y)
    assert torch.equal(r1_penalty(CRITICS[name](D, y), images), want)
    value = gradient_penalty(CRITICS[name](D, y), images, -images)
    value.backward()
    assert value.dtype == torch.float32
    assert D.body[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lambda", "partial", "partial of a function", "bound", "default"])
def test_half_precision_images_are_widened_for_weights_of_float32(name, dtype):
    D, images, y = projection(torch.float32), X.to(dtype), torch.randn(4, 6)
    assert torch.equal(r1_penalty(CRITICS[name](D, y), images), r1_penalty(D, images.float(), y))


def test_a_condition_follows_the_images():
    """An embedding that autocast made is of half precision, and the penalty runs outside of autocast."""
    D, embed = projection(torch.float32), nn.Linear(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = embed(torch.randn(4, 5))
        assert y.dtype == torch.bfloat16
        for condition in (y, (y, 1.0)):
            value = r1_penalty(D, X.bfloat16(), condition)
            assert torch.equal(value, r1_penalty(D, X.bfloat16().float(), y.float()))
        value.backward()
    assert embed.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_and_fake_of_autocast(dtype):
    """Generated images are of half precision there, real ones are not."""
    for critic in (D := projection(torch.float32), of_an_attribute(Trainer(D, LABELS))):
        condition = LABELS if critic is D else None
        real, fake = X.float(), -X.to(dtype)
        values = [gradient_penalty(critic, real, f, 1.0, torch.Generator().manual_seed(0), condition)
                  for f in (fake, fake.float())]  # fmt: skip
        assert torch.equal(*values)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda D: r1_penalty(D, X), TypeError, r"takes more than images.*condition=y, or lambda x: critic\(x, y\)"),
        (lambda D: gradient_penalty(D, X, X), TypeError, "takes more than images"),
        (lambda D: LazyPenalty(r1_penalty)(0, nn.DataParallel(D), X), TypeError, "takes more than images"),
        (lambda D: gradient_penalty(D, X, X, LABELS), TypeError, "center must be a number.*condition="),
        (lambda D: dragan_penalty(D, X[:1], LABELS[:1]), TypeError, "center must be a number.*condition="),
        (lambda D: r1_penalty(D, X.float(), LABELS), TypeError, r"float32 images and weights.*same dtype.*condition="),
        (lambda D: r1_penalty(lambda x: (D(x, LABELS), 1), X), TypeError, r"not tuple: .*lambda x: D\(x\)\[0\]"),
        (lambda D: r1_penalty(lambda x: [D(x, LABELS)] * 2, X), TypeError, r"not list: .*lambda x: D\(x\)\[0\]"),
        (lambda D: r1_penalty(lambda x: D(x, LABELS)[:, None] + D(x, LABELS), X), ValueError, r"\[4, 4\].*\[B, 1\] to"),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(projection())


def test_an_error_of_the_critics_own_is_left_as_it_is():
    def critic(x):
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match=r"^out of ideas$"):
        r1_penalty(critic, X)

    def calls_wrongly(x):
        return x.sum((1, 2, 3)) + torch.zeros(5)

    with pytest.raises(RuntimeError, match="size of tensor"):
        r1_penalty(calls_wrongly, X)


@pytest.mark.parametrize("shape", [(4, 1, 3, 3), (4, 3, 3), (4, 2, 3, 3), (4, 1, 1, 1), (4, 3), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_maps_of_scores_are_named_with_their_remedy(penalty, shape):
    """PatchGAN's [B, 1, H, W], and what else a critic may return for every sample."""
    critic = nn.Sequential(nn.Flatten(), nn.Linear(108, torch.Size(shape).numel() // 4), nn.Tanh()).double()
    critic.append(nn.Unflatten(1, shape[1:]))
    function = PENALTIES[penalty][0]
    with pytest.raises(ValueError, match=r"lambda x: D\(x\).flatten\(1\).mean\(1\)"):
        function(critic, X)
    value = function(lambda x: critic(x).flatten(1).mean(1), X)
    torch.testing.assert_close(value, plain(penalty, lambda x, _: critic(x).flatten(1).mean(1), X, None))
