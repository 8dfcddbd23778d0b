"""Layers on held weights: gradients of the selected rows alone, of any order, and equal to those of dense training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sample_networks import assert_close, held, taken
from torch import nn

from minegan_fast import gradient_penalty, path_length_penalty, r1_penalty
from minegan_fast.finetune import SparseFinetuner
from minegan_fast.finetune.rows.parameters import HeldWeight
from minegan_fast.layers import bilinear
from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator
from minegan_fast.ops import modulated_conv2d


class Modulated(nn.Module):
    """A modulated convolution, its style the mean of its input; its weight has four axes, or five as in StyleGAN2."""

    bias = None

    def __init__(self, axes=5, **options):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 6, 3, 3, 3)[0 if axes == 4 else slice(None)])
        self.options = options

    def neuron_parameters(self):
        return [[("weight", self.weight.ndim - 4)]]

    def forward(self, x):
        return modulated_conv2d(x, self.weight, 1 + x.mean((2, 3)), **self.options)


TAPS = torch.ones(2, 2, dtype=torch.float64)

LAYERS = {
    "linear": (lambda: nn.Linear(5, 6), (4, 5)),
    "linear on a sequence": (lambda: nn.Linear(5, 6), (4, 3, 5)),
    "linear on a vector": (lambda: nn.Linear(5, 6, bias=False), (5,)),
    "conv1d": (lambda: nn.Conv1d(3, 6, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, padding=1), (2, 3, 5, 6)),
    "conv2d unbatched": (lambda: nn.Conv2d(3, 6, 3, padding=1), (3, 5, 6)),
    "conv2d stride dilation": (
        lambda: nn.Conv2d(3, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=1),
        (2, 3, 8, 7),
    ),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 5, 5)),
    "conv2d same": (lambda: nn.Conv2d(3, 6, 3, padding="same"), (2, 3, 5, 5)),
    "conv2d same even": (lambda: nn.Conv2d(3, 6, (2, 4), padding="same", dilation=(1, 1)), (2, 3, 5, 5)),
    "conv2d valid": (lambda: nn.Conv2d(3, 6, 3, padding="valid"), (2, 3, 5, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, stride=2), (2, 2, 4, 5, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 6, 4, stride=2, padding=1), (2, 3, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 6, 3, stride=2, output_padding=1, padding=1), (2, 3, 4, 5)),
    "modulated": (Modulated, (2, 3, 5, 4)),
    "modulated, four axes": (lambda: Modulated(4, demodulate=False), (2, 3, 5, 4)),
    "modulated up": (lambda: Modulated(up=True, kernel=TAPS), (2, 3, 3, 4)),
    "modulated down": (lambda: Modulated(4, down=True, kernel=TAPS / 4), (2, 3, 6, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 6, 2, stride=2), (2, 2, 3, 3, 2)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_all_orders_are_the_dense_ones(name):
    make, shape = LAYERS[name]
    plain, module, _ = held(make)
    results = []
    for net in (plain, module):
        torch.manual_seed(1)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = net(x)
        weights = [p for p in (net.weight, net.bias) if p is not None]
        leaves = [p.link.leaf if isinstance(p, HeldWeight) else p for p in weights]
        (gx,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        (ggx,) = torch.autograd.grad(gx.square().sum(), x, create_graph=True)
        gradients = torch.autograd.grad((gx * ggx).sum() + y.square().sum() + gx.pow(4).sum(), [x, *leaves])
        results.append((y, gx, ggx, gradients))
    (y, gx, ggx, (dx, *dense)), (y2, gx2, ggx2, (dx2, *rows)) = results
    for ours, theirs in ((y2, y), (gx2, gx), (ggx2, ggx), (dx2, dx)):
        assert_close(ours, theirs)
    for ours, theirs, parameter in zip(rows, dense, (module.weight, module.bias), strict=False):
        assert_close(ours, taken(theirs, parameter))
    assert module.weight.link.row_uses
    assert not module.weight.link.dense_uses


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_gradgradcheck(name):
    make, shape = LAYERS[name]
    _, module, _ = held(make)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaf = module.weight.link.leaf

    def function(x, leaf):
        return module(x)

    # the leaf moves the rows of the dense weight only when it is written through
    def moved(x, values):
        with torch.no_grad():
            leaf.copy_(values)
        module.weight.link.sync()
        return function(x, leaf)

    eps = 1e-6
    y = function(x, leaf)
    v = torch.randn_like(y)
    (analytic,) = torch.autograd.grad(y, leaf, v, retain_graph=True)
    direction, start = torch.randn_like(leaf), leaf.detach().clone()
    numeric = (moved(x, start + eps * direction) - moved(x, start - eps * direction)).mul(v).sum() / (2 * eps)
    moved(x, start)
    torch.testing.assert_close((analytic * direction).sum(), numeric, rtol=1e-6, atol=1e-7)

    def penalty():
        (gx,) = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)
        return gx.square().sum()

    (analytic,) = torch.autograd.grad(penalty(), leaf)
    values = []
    for sign in (1, -1):
        moved(x, start + sign * eps * direction)
        values.append(penalty().detach())
    torch.testing.assert_close((analytic * direction).sum(), (values[0] - values[1]) / (2 * eps), rtol=1e-6, atol=1e-6)
    torch.autograd.gradcheck(module, (x,))
    torch.autograd.gradgradcheck(module, (x,))


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d grouped", "transposed 2d"])
def test_a_layer_without_selected_rows_keeps_no_input(name):
    make, shape = LAYERS[name]
    plain, module, ft = held(make)
    ft.release()
    both = nn.ModuleList([module, nn.Linear(2, 2).double()])
    ft = SparseFinetuner(both)
    ft.select({"1.weight": [0]})
    kept = []
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x.clone())
    assert [t.shape for t in kept if t is not None] == [module.weight.shape]
    assert kept[0].data_ptr() == module.weight.data_ptr()  # not even a copy of the weight
    y.sum().backward()
    plain(twin := x.detach().clone().requires_grad_()).sum().backward()
    assert_close(x.grad, twin.grad)


def test_no_gradient_of_a_weight_is_dense(row_gradients):
    """Every weight gradient that the backward computes has k rows."""
    net = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 16, 30))
    ft = SparseFinetuner(net)
    ft.select({"0.weight": [4], "3.weight": [1, 7]})
    net(torch.randn(2, 3, 6, 6)).square().sum().backward()
    assert sorted(tuple(t.shape) for t in row_gradients) == [(1, 3, 3, 3), (2, 320)]
    assert [tuple(p.grad.shape) for p in ft.parameters()] == [(1, 3, 3, 3), (1,), (2, 320), (2,)]


def test_the_inner_pass_of_a_penalty_computes_no_weight_gradient(row_gradients):
    critic = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Softplus(), nn.Conv2d(6, 1, 4), nn.Flatten(0))
    SparseFinetuner(critic).select({"0.weight": [1], "2.weight": [0]})
    penalty = r1_penalty(critic, torch.randn(2, 3, 6, 6))
    assert not row_gradients
    penalty.backward()
    # the second layer: its input gradient's; the first: its layer's and its input gradient's
    assert len(row_gradients) == 3


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed 2d"])
def test_autocast(name):
    make, shape = LAYERS[name]
    plain, module, _ = held(make)
    plain.float(), module.float()
    x = torch.randn(shape)
    results = []
    for net in (plain, module):
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        results.append(y)
    assert torch.equal(*results)
    leaf = module.weight.link.leaf
    assert leaf.grad.dtype == torch.float32
    exact = taken(plain.weight.grad, module.weight)
    # one rounding to bfloat16, of sums in another order
    torch.testing.assert_close(leaf.grad, exact, rtol=2**-7, atol=2**-7 * exact.abs().max().item())


def test_requires_grad_turns_the_rows_off():
    _, module, ft = held(lambda: nn.Linear(4, 6))
    module.requires_grad_(False)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    assert all(p.grad is None for p in ft.parameters())
    module.requires_grad_(True)
    module(x).sum().backward()
    assert all(p.grad is not None for p in ft.parameters())


def test_a_sparse_gradient_is_an_error():
    net = nn.Embedding(5, 3, sparse=True)
    ft = SparseFinetuner(net)
    ft.select({"weight": [1]})
    with pytest.raises(RuntimeError, match="sparse=False"):
        net(torch.tensor([1, 2])).sum().backward()


class Table(nn.Module):
    """LeafParameter of a table, as they are or transposed, so that its neurons are the columns."""

    def __init__(self, transposed, padding=None):
        super().__init__()
        self.weight, self.transposed, self.padding = nn.Parameter(torch.randn(6, 7)), transposed, padding

    def forward(self, labels):
        return F.embedding(labels, self.weight.t() if self.transposed else self.weight * 2, self.padding)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_embeddings_take_the_way_of_the_rows(shape, transposed):
    plain = Table(transposed).double()
    module = copy.deepcopy(plain)
    ft = SparseFinetuner(module)
    ft.select({"weight": [1, 4]})
    labels = torch.randint(6, shape)
    for net in (plain, module):
        y = net(labels)
        (gy,) = torch.autograd.grad(y.pow(3).sum(), y, create_graph=True)
        (y.tanh().sum() + gy.square().sum()).backward()
    assert_close(module(labels), plain(labels))
    assert_close(module.weight.link.leaf.grad, taken(plain.weight.grad, module.weight))
    assert module.weight.link.row_uses == {"embedding"}
    assert not module.weight.link.dense_uses


@pytest.mark.parametrize("transposed", [False, True])
def test_an_embedding_in_half_precision_stays_in_it(transposed):
    plain = Table(transposed).to(torch.bfloat16)
    module = copy.deepcopy(plain)
    ft = SparseFinetuner(module)
    ft.select({"weight": [1, 4]})
    labels = torch.tensor([4, 4, 1, 0])
    y, want = module(labels), plain(labels)
    assert y.dtype == want.dtype == torch.bfloat16
    assert torch.equal(y, want)
    y.float().square().sum().backward()
    want.float().square().sum().backward()
    grad = module.weight.link.leaf.grad
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, taken(plain.weight.grad, module.weight).float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("padding", [1, 2, -2])
def test_the_padding_row_of_an_embedding_gets_no_gradient(padding, transposed):
    plain = Table(transposed, padding).double()
    module = copy.deepcopy(plain)
    ft = SparseFinetuner(module)
    ft.select({"weight": [1, 4]})
    for net in (plain, module):
        net(torch.tensor([[1, 4, 4], [2, 3, 0]])).square().sum().backward()
    assert_close(module.weight.link.leaf.grad, taken(plain.weight.grad, module.weight))
    assert module.weight.link.row_uses == {"embedding"}
    assert not module.weight.link.dense_uses


def test_stylegan2_with_all_penalties_trains_as_dense():
    """Generator and critic, sparse: R1, WGAN-GP and path length reach the selected rows as in dense training, and every
    weight that a convolution or a linear layer uses takes the way of the rows."""
    torch.manual_seed(0)
    plain_g = StyleGAN2Generator(16, latent_dim=8, channel_base=128, channel_max=12, mapping_layers=2).double()
    plain_d = StyleGAN2Discriminator(16, channel_base=128, channel_max=12).double()
    with torch.no_grad():
        for p in plain_g.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    sparse_g, sparse_d = copy.deepcopy(plain_g), copy.deepcopy(plain_d)
    optimizers = [SparseFinetuner(net, density=0.3, criterion="random", scope="layer") for net in (sparse_g, sparse_d)]
    for ft in optimizers:
        ft.select()
    values = []
    for generator, critic in ((plain_g, plain_d), (sparse_g, sparse_d)):
        torch.manual_seed(2)
        z, real = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 3, 16, 16, dtype=torch.float64)
        images, latents = generator(z, return_latents=True, noise="constant")
        score = F.softplus(-critic(images)).mean() + F.softplus(critic(real)).mean()
        score = score + r1_penalty(critic, real) + gradient_penalty(critic, real, images.detach())
        penalty, _, _ = path_length_penalty(images, latents, generator=torch.Generator().manual_seed(3))
        values.append(score + penalty)
        values[-1].backward()
    assert_close(values[1], values[0])
    for ft, plain in zip(optimizers, (plain_g, plain_d), strict=True):
        for member in (m for layer in ft.layers for m in layer.members):
            theirs = plain.get_parameter(member.name).grad
            ours = member.parameter.link.leaf.grad
            if theirs.ndim:
                theirs = taken(theirs, member.parameter)
            torch.testing.assert_close(ours, theirs.view_as(ours), rtol=1e-8, atol=1e-10 * theirs.abs().max().item())
        dense = [line for line in ft.summary().splitlines() if "dense, then" in line]
        assert all(line.startswith("input.input ") for line in dense), dense


def test_the_output_of_a_frozen_mapping_network_can_be_differentiated_by():
    """As path length does with the latents; but not while the script has turned the network off."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 3, 1))
    ft = SparseFinetuner(net)
    ft.select({"3.weight": [1]})
    z = torch.randn(2, 4)
    for flag in (True, False, True):
        net.requires_grad_(flag)
        latents = net[:2](z)
        assert latents.requires_grad == flag
        assert net[2:](latents).requires_grad == flag
    net.requires_grad_(True)
    penalty, _, _ = path_length_penalty(net[2:](latents), latents)
    penalty.backward()
    assert ft.parameters()[0].grad.abs().sum() > 0
    assert z.grad is None
    assert not z.requires_grad


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d grouped", "transposed 2d"])
def test_where_the_dense_gradient_is_faster_it_is_computed_and_gathered(name, monkeypatch, row_gradients):
    monkeypatch.setattr(bilinear, "dense_is_faster", lambda *a: True)
    make, shape = LAYERS[name]
    plain, module, ft = held(make)
    x = torch.randn(shape, dtype=torch.float64)
    for net in (plain, module):
        net(x).square().sum().backward()
    assert [len(t) for t in row_gradients] == [6]
    assert_close(ft.parameters()[0].grad, taken(plain.weight.grad, module.weight))
