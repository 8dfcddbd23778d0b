"""Critics under second_order(): what PyTorch's own functions give, and the passes that a penalty then runs."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from minegan_fast import SparseFinetuner
from minegan_fast.layers import gradient_penalty, r1_penalty
from minegan_fast.layers.second_order import second_order
from minegan_fast.models import BigGANDiscriminator, PGANDiscriminator, StyleGAN2Discriminator
from minegan_fast.ops import interpolate

relative = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.05}


class Residual(nn.Module):
    def __init__(self, act, norm=None, inplace=False):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act = act(inplace=True) if inplace else act()
        self.norm = norm() if norm else nn.Identity()

    def forward(self, x):
        return F.avg_pool2d(x + self.two(self.act(self.norm(self.one(self.act(x))))), 2)


def critic_of(*layers, channels=4, size=8):
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1), *layers, nn.Flatten(), nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 1)
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x):
        q, k, v = (f(x).flatten(2) for f in (self.q, self.k, self.v))
        return x + (v @ (q.mT @ k).softmax(-1)).view_as(x)


class Geometries(nn.Module):
    """Convolutions of all kinds, in one to three dimensions."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(2, 4, 3, padding="same", dilation=2),
                nn.Conv2d(4, 6, 4, padding="same", groups=2, bias=False),
                nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
                nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
                nn.ConvTranspose2d(6, 4, 4, stride=2, bias=False),
                nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
                nn.Conv2d(4, 4, 3, padding="valid", groups=4),
                nn.AvgPool2d((3, 2), stride=(2, 1), padding=1, ceil_mode=True, count_include_pad=False),
            ]
        )
        self.line, self.volume = nn.Conv1d(4, 3, 3, stride=2), nn.Conv3d(1, 2, 2)
        self.up1, self.up3 = nn.ConvTranspose1d(3, 2, 3), nn.ConvTranspose3d(2, 1, 2, stride=2)
        self.last = nn.LazyLinear(1)

    def forward(self, x):
        for f in self.layers:
            x = F.leaky_relu(f(x), 0.1)
        x = torch.stack([F.avg_pool2d(self.layers[-2](one), 2, divisor_override=3) for one in x])  # unbatched
        a = self.up1(torch.relu(self.line(x.flatten(2)))).flatten(1)
        b = self.up3(self.volume(x.unsqueeze(1)).relu()).flatten(1)
        return self.last(torch.cat([a, b.tanh()], 1))


class Expressions(nn.Module):
    """Weights that are computed: scaled, demodulated, spectrally normalised; rectifiers of every spelling."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.spectral = nn.utils.spectral_norm(nn.Conv2d(4, 4, 3))
        self.parametrised = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 4))
        self.eval()

    def forward(self, x):
        x = F.relu_(F.conv2d(x, self.weight * 0.3, padding=0))
        x = F.leaky_relu(self.spectral(x), negative_slope=0.2, inplace=True)
        w = self.parametrised.weight
        x = F.conv2d(input=x, weight=w * torch.rsqrt(w.square().sum((1, 2, 3), keepdim=True)), bias=None)
        x = torch.relu_(x).flatten(1) + 0.5
        return self.normed(F.leaky_relu_(x - 1, 0.1).relu()).sum(1)


CRITICS = {
    "relu": lambda: critic_of(Residual(nn.ReLU), Residual(nn.ReLU)),
    "relu in place": lambda: critic_of(Residual(nn.ReLU, inplace=True), nn.ReLU(inplace=True)),
    "leaky relu in place": lambda: critic_of(nn.LeakyReLU(0.2, inplace=True), Residual(nn.LeakyReLU)),
    "softplus": lambda: critic_of(Residual(nn.Softplus)),
    "tanh, silu": lambda: critic_of(nn.Tanh(), Residual(nn.SiLU)),
    "prelu, elu, relu6, max pool": lambda: critic_of(nn.PReLU(), nn.ELU(), nn.ReLU6(), nn.MaxPool2d(2)),
    "batch norm": lambda: critic_of(Residual(nn.ReLU, lambda: nn.BatchNorm2d(4))),
    "layer norm": lambda: critic_of(Residual(nn.ReLU, lambda: nn.LayerNorm(8))),
    "instance norm": lambda: critic_of(Residual(nn.LeakyReLU, lambda: nn.InstanceNorm2d(4, affine=True))),
    "group norm": lambda: critic_of(Residual(nn.ReLU, lambda: nn.GroupNorm(2, 4))),
    "attention": lambda: critic_of(Attention(), nn.ReLU()),
    "geometries": Geometries,
}


def parts(network, x):
    """Scores, penalty, gradients of all parameters, by plain autograd and by ours."""
    network = network.to(x.dtype)
    with torch.no_grad():
        network(x)  # lazy layers
    found = []
    for ours in (False, True):
        twin, other = copy.deepcopy(network), copy.deepcopy(network)
        leaf = x.clone().requires_grad_()
        if ours:
            with second_order():
                score = twin(leaf)
            penalty = r1_penalty(other, x)
        else:
            score = twin(leaf)
        (g,) = torch.autograd.grad(score.sum(), leaf, create_graph=True)
        g = g.float() if g.dtype == torch.bfloat16 else g
        expected = g.flatten(1).square().sum(1).mean()
        (expected + score.float().square().mean() if x.dtype == torch.bfloat16 else expected).backward()
        if ours:
            torch.testing.assert_close(penalty, expected, rtol=relative[x.dtype], atol=0)
        found.append((score, g, [p.grad for p in twin.parameters()]))
    return found


def assert_same(found, dtype):
    (score, g, grads), (own_score, own_g, own_grads) = found
    rtol = relative[dtype]
    for a, b in ((own_score, score), (own_g, g)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.detach().abs().max()))
    assert [p is None for p in own_grads] == [p is None for p in grads]
    largest = max(float(b.abs().max()) for b in grads if b is not None)  # a bias before a norm has rounding alone
    for a, b in zip(own_grads, grads, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * largest)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CRITICS)
def test_weights_get_the_gradients_of_plain_autograd(name, dtype):
    assert_same(parts(CRITICS[name](), torch.randn(3, 2, 8, 8, dtype=dtype)), dtype)


def test_channels_last():
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    critic = CRITICS["relu"]().double()
    critic(x)
    assert_same(parts(critic.to(memory_format=torch.channels_last), x), torch.float64)


def test_bfloat16_weights():
    assert_same(parts(CRITICS["relu"](), torch.randn(3, 2, 8, 8).bfloat16()), torch.bfloat16)


def test_weights_that_are_expressions():
    assert_same(parts(Expressions(), torch.randn(3, 2, 8, 8, dtype=torch.float64)), torch.float64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: StyleGAN2Discriminator(16, channel_base=128),
        lambda: PGANDiscriminator(16, channel_base=128),
    ],
    ids=["stylegan2", "pgan"],
)
def test_critics_of_this_library(make):
    assert_same(parts(make(), torch.randn(4, 3, 16, 16, dtype=torch.float64)), torch.float64)


def test_a_conditional_critic():
    D = BigGANDiscriminator(32, num_classes=3, channel_width=4, attention=()).double().eval()
    labels, x = torch.tensor([0, 2, 1]), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    D(x, labels)
    found = []
    for critic in (D, copy.deepcopy(D)):
        leaf = x.clone().requires_grad_()
        if critic is D:
            (g,) = torch.autograd.grad(critic(leaf, labels).sum(), leaf, create_graph=True)
            penalty = g.flatten(1).square().sum(1).mean()
        else:
            penalty = r1_penalty(lambda x, critic=critic: critic(x, labels), x)
        penalty.backward()
        found.append((penalty, penalty, [p.grad for p in critic.parameters()]))
    assert_same(found, torch.float64)


def test_gradient_penalty_matches_plain_autograd():
    critic, real, fake = CRITICS["relu"](), *torch.randn(2, 3, 2, 8, 8)
    critic(real)
    plain = copy.deepcopy(critic)
    seeded = [torch.Generator().manual_seed(1) for _ in range(2)]
    gradient_penalty(critic, real, fake, generator=seeded[0]).backward()
    x = interpolate(real, fake, generator=seeded[1]).requires_grad_()
    (g,) = torch.autograd.grad(plain(x).sum(), x, create_graph=True)
    (g.flatten(1).norm(dim=1) - 1).square().mean().backward()
    for p, q in zip(critic.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("slope", [0, 0.0, 0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rectifiers_are_those_of_pytorch_bit_for_bit(dtype, slope, inplace):
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 6e-8, -6e-8, 1e-45, -1e-45])
    x = torch.cat([special, torch.randn(91)]).to(dtype).view(10, 10)[:, ::3]
    functions = [lambda v: F.leaky_relu(v, slope, inplace)] + [lambda v: F.relu(v, inplace)] * (slope == 0)
    for function in functions:
        results = []
        for ours in (False, True):
            leaf = x.clone().requires_grad_()
            given = leaf * 1
            if ours:
                with second_order():
                    y = function(given)
                assert "Rectifier" in y.grad_fn.name()
            else:
                y = function(given)
            assert (y is given) == inplace
            gy = torch.linspace(-2, 2, y.numel()).view_as(y).to(dtype).requires_grad_()
            (gx,) = torch.autograd.grad(y, leaf, gy, create_graph=True)
            (dgy,) = torch.autograd.grad(gx, gy, gy.detach().flip(0), retain_graph=True)
            results.append((y, gx, dgy))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            assert torch.equal(a.signbit(), b.signbit())


def test_in_place_stays_in_place():
    x = torch.randn(4, 5, requires_grad=True)
    with second_order():
        a = x * 2
        b = nn.ReLU(inplace=True)(a)
        total = (a + b).sum()
        view = (x * 3).view(20)
        c = F.relu(view, inplace=True)
    assert b is a
    assert a._version > 0
    (gx,) = torch.autograd.grad(total + c.sum(), x)
    assert torch.equal(gx, 7.0 * (x > 0))
    with second_order(), pytest.raises(RuntimeError, match="leaf"):
        F.relu_(x)
    kept = x.exp()
    with second_order():
        torch.relu_(kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_all_orders():
    x, w, b = torch.randn(2, 2, 5, 5), torch.randn(4, 1, 3, 3), torch.randn(4)
    v = torch.randn(6, 4 * 9)
    tensors = [t.double().requires_grad_() for t in (x, w, b, v)]

    def function(x, w, b, v):
        with second_order():
            y = F.linear(F.leaky_relu(F.conv2d(x, w, b, groups=2), 0.3).tanh().flatten(1), v)
            return F.conv_transpose1d(y[:, None], w[:1, :, 0], stride=2)

    def penalty(x, w, b, v):
        return torch.autograd.grad(function(x, w, b, v).square().sum(), (x, w, v), create_graph=True)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradcheck(penalty, tensors)
    assert torch.autograd.gradgradcheck(penalty, tensors)


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU])
def test_a_penalty_on_a_vectorised_jacobian(act):
    torch.manual_seed(0)
    D = nn.Sequential(nn.Conv2d(2, 4, 3), act(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2), nn.Flatten()).double()
    x, results = torch.randn(2, 2, 6, 6).double(), []
    for context in (second_order, nullcontext):
        with context():
            slopes = torch.autograd.functional.jacobian(D, x, create_graph=True, vectorize=True)
            second = torch.autograd.grad(slopes.square().sum(), list(D.parameters()), allow_unused=True)
        results.append([slopes, *(g for g in second if g is not None and g.any())])
    assert len(results[0]) > 1
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


class Convolutions(TorchDispatchMode):
    """Convolutions by kernel size, and which gradients of convolutions there are."""

    def __init__(self):
        super().__init__()
        self.forward, self.inputs, self.weights, self.kernels = 0, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.forward += 1
            self.kernels.add(tuple(args[1].shape[2:]))
        if function is torch.ops.aten.convolution_backward.default:
            self.inputs += args[-1][0]
            self.weights += args[-1][1]
            self.kernels.add(tuple(args[2].shape[2:]))
        return function(*args, **(kwargs or {}))

    @property
    def counts(self):
        return self.forward, self.inputs, self.weights


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU])
def test_a_rectified_critic_runs_every_layer_four_times(act, inplace):
    critic = critic_of(Residual(act, inplace=inplace), act())
    x = torch.randn(3, 2, 8, 8)
    critic(x)
    with Convolutions() as inner:
        penalty = r1_penalty(critic, x)
    assert inner.counts == (3, 3, 0)
    with Convolutions() as outer:
        penalty.backward()
    assert outer.counts == (3, 0, 3)
    assert inner.kernels | outer.kernels == {(3, 3)}


def test_a_smooth_critic_runs_six_passes_where_it_is_smooth():
    critic = critic_of(Residual(nn.Softplus))
    x = torch.randn(3, 2, 8, 8)
    critic(x)
    with Convolutions() as seen:
        r1_penalty(critic, x).backward()
    # what the last convolution gives is not bent before the average
    assert seen.counts == (3 + 3, 3 + 2, 3 + 2)
    assert seen.kernels == {(3, 3)}


def test_a_sparse_critic_computes_the_selected_rows_alone(row_gradients):
    critic = nn.Sequential(
        nn.Conv2d(2, 10, 3), nn.ReLU(), nn.Conv2d(10, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 1)
    )
    plain, x = copy.deepcopy(critic), torch.randn(3, 2, 8, 8)
    ft = SparseFinetuner(critic)
    ft.select({"0.weight": [2, 7], "2.weight": [5]})
    with Convolutions() as inner:
        penalty = r1_penalty(critic, x)
    assert not row_gradients
    assert inner.counts == (2, 2, 0)
    with Convolutions() as outer:
        penalty.backward()
    assert sorted(len(t) for t in row_gradients) == [1, 2]
    assert outer.counts[:2] == (2, 0)
    assert outer.kernels == {(3, 3)}
    r1_penalty(plain, x).backward()
    first = next(p.grad for p in ft.parameters() if p.shape == (2, 2, 3, 3))
    torch.testing.assert_close(first, plain[0].weight.grad[[2, 7]])


def test_hooks_fire():
    critic, fired = critic_of(nn.ReLU()), []
    x = torch.randn(3, 2, 8, 8)
    critic(x)
    critic[0].register_forward_hook(lambda *_: fired.append("forward"))
    critic[0].register_full_backward_hook(lambda *_: fired.append("backward"))
    critic[0].weight.register_hook(lambda g: fired.append("weight"))
    penalty = r1_penalty(critic, x)
    assert fired == ["forward", "backward"]
    penalty.backward()
    assert "weight" in fired


def test_checkpointed_parts_are_left_alone():
    critic = critic_of(Residual(nn.ReLU))
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    critic.double()(x)
    plain = copy.deepcopy(critic)

    def saving(x):
        return critic[4:](checkpoint(lambda x: critic[:4](x), x, use_reentrant=False))

    r1_penalty(saving, x).backward()
    r1_penalty(plain, x).backward()
    for p, q in zip(critic.parameters(), plain.parameters(), strict=True):
        if p.grad is None:  # the rest says so of a bias in front of it
            assert q.grad is None or not q.grad.any()
        else:
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("kind", ["compiled", "scripted", "traced"])
def test_compiled_critics_run_as_they_are(kind):
    critic = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 1))
    x = torch.randn(2, 2, 5, 5)
    make = {
        "compiled": lambda c: torch.compile(c, backend="eager"),
        "scripted": torch.jit.script,
        "traced": lambda c: torch.jit.trace(c, x),
    }[kind]
    expected = r1_penalty(critic, x)
    torch.testing.assert_close(r1_penalty(make(critic), x), expected)


def test_transforms_and_autocast_are_left_alone():
    critic = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 1))
    x = torch.randn(2, 2, 5, 5)

    def value(x):
        with second_order():
            return critic(x).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(critic(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(value)(x), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda x: value(x[None])))(x), expected)
    with second_order(), torch.autocast("cpu", torch.bfloat16):
        assert critic[0](x).dtype == torch.bfloat16

    def mixed(x):
        with torch.autocast("cpu", torch.bfloat16):
            return critic(x)

    torch.testing.assert_close(r1_penalty(mixed, x), r1_penalty(critic, x), rtol=0.1, atol=0)


def test_outer_pass_under_autocast_stays_in_float32():
    critic = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 1))
    plain, x = copy.deepcopy(critic), torch.randn(2, 2, 5, 5)
    r1_penalty(plain, x).backward()
    with torch.autocast("cpu", torch.bfloat16):
        r1_penalty(critic, x).backward()
    torch.testing.assert_close(critic[0].weight.grad, plain[0].weight.grad)


def test_distributed_data_parallel(group_of_one):
    critic = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 1))
    plain, x = copy.deepcopy(critic), torch.randn(2, 2, 5, 5)
    wrapped = nn.parallel.DistributedDataParallel(critic)
    for _ in range(2):  # the second forward would refuse a parameter that the first backward left out
        wrapped.zero_grad()
        (wrapped(x).mean() + r1_penalty(wrapped.module, x) + r1_penalty(wrapped, x)).backward()
    (plain(x).mean() + 2 * r1_penalty(plain, x)).backward()
    for p, q in zip(critic.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
