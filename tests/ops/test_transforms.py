"""The public ops inside transforms, torch.func's and the batched backward: right, or refused with the way out."""

import re

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from minegan_fast.layers import dragan_penalty, gradient_penalty, path_length_penalty, r1_penalty
from minegan_fast.models import (
    BigGANDiscriminator,
    PGANDiscriminator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    StyleGANGenerator,
)
from minegan_fast.ops import (
    Chain,
    MmdTarget,
    bias_act,
    interpolate,
    miner,
    minibatch_stddev,
    mmd2,
    mmd_groups,
    modulated_conv2d,
    noise_bias_act,
    row_gradient,
    transposed_conv2d,
    upfirdn2d,
)
from minegan_fast.ops.mmd import KERNELS

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
FEATURES, OTHERS = X.reshape(12, 36)[:, :5], X.reshape(12, 36)[:, 5:10] + 0.3
W = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
KERNEL, BIAS, ONE = torch.tensor([1.0, 2.0, 1.0, 0.5]), torch.tensor([0.1, -0.2, 0.3]), torch.tensor(0.7)
CRITIC = nn.Sequential(nn.Conv2d(3, 4, 6), nn.Softplus(), nn.Flatten(), nn.Linear(4, 1))
TARGET = MmdTarget([OTHERS], [1.0])

OPS = {
    **{f"mmd2 {kernel}": (FEATURES, lambda x, kernel=kernel: mmd2(x, OTHERS, kernel, 2.0)) for kernel in KERNELS},
    "mmd2 median": (FEATURES, lambda x: mmd2(x, OTHERS)),
    "mmd2 unwatched": (FEATURES, lambda x: mmd2(x, OTHERS, bandwidth=1.0, validate=False)),
    "mmd_groups": (FEATURES, lambda x: mmd_groups([x], TARGET)),
    "mmd_groups unwatched": (FEATURES, lambda x: mmd_groups([x], TARGET, validate=False)),
    "miner": (FEATURES, lambda x: miner([Chain(x, [W.view(4, 3, 9)[..., :5]], [W[:, 0, 0]], skip=None)])[0]),
    "bias_act": (X, lambda x: bias_act(x, BIAS, act="lrelu")),
    "bias_act alone": (X, lambda x: bias_act(x, act="relu")),
    "bias_act linear": (X, lambda x: bias_act(x)),
    "upfirdn2d": (X, lambda x: upfirdn2d(x, KERNEL, up=2, padding=2)),
    "modulated_conv2d": (X, lambda x: modulated_conv2d(x, W, torch.ones(4, 3))),
    "modulated_conv2d up": (X, lambda x: modulated_conv2d(x, W, torch.ones(4, 3), up=True, kernel=KERNEL)),
    "minibatch_stddev": (X, lambda x: minibatch_stddev(x, 2)),
    "noise_bias_act": (X, lambda x: noise_bias_act(x, None, X[:1, :1], ONE, BIAS, act="lrelu")),
    "noise that is searched for": (X[:, :1], lambda n: noise_bias_act(X, None, n, ONE, BIAS, act="lrelu")),
    "transposed_conv2d": (X, lambda x: transposed_conv2d(x, W[:3])),
    "interpolate": (X, lambda x: interpolate(x, -x.flip(0), 0.3)),
    "row_gradient": (X, lambda x: row_gradient(x, x[:, :2, 1:-1, 1:-1], (3, 3))),
    "row_gradient linear": (X, lambda x: row_gradient(x, x.tanh())),
    "path_length_penalty": (
        FEATURES,
        lambda w: path_length_penalty((w @ W.flatten()[:80].view(5, 16)).tanh().view(-1, 1, 4, 4), w, 0.3, 0.0,
                                      torch.Generator().manual_seed(2))[0],
    ),
}  # fmt: skip
PENALTIES = {
    "r1_penalty": r1_penalty,
    "gradient_penalty": lambda D, x: gradient_penalty(D, x, -x, generator=torch.Generator().manual_seed(2)),
    "dragan_penalty": lambda D, x: dragan_penalty(D, x, generator=torch.Generator().manual_seed(2)),
}


def by_the_weights(penalty):
    """A penalty as a function of the critic's first weight: what a functional training loop differentiates."""
    return lambda weight: penalty(lambda x: functional_call(CRITIC, {"0.weight": weight}, (x,)), X)


OPS |= {name: (CRITIC[0].weight.detach(), by_the_weights(penalty)) for name, penalty in PENALTIES.items()}


def plain_gradient(f, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf).square().sum(), leaf)[0]


def batched(f, x):
    leaf = x.clone().requires_grad_()
    y = f(leaf).square().sum()
    return torch.autograd.grad(y, leaf, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0][1] / 2


def vectorised(f, x):
    return torch.autograd.functional.jacobian(lambda x: f(x).square().sum(), x, vectorize=True)


def batched_outside(f, x):
    leaf = x.clone().requires_grad_()
    y = f(leaf).square().sum()
    return vmap(lambda v: torch.autograd.grad(y, leaf, v)[0])(torch.tensor([1.0, 2.0]))[0]


GRADIENTS = {
    "grad": lambda f, x: grad(lambda x: f(x).square().sum())(x),
    "jacrev": lambda f, x: jacrev(lambda x: f(x).square().sum())(x),
    "jacfwd": lambda f, x: jacfwd(lambda x: f(x).square().sum(), randomness="different")(x),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: f(x).square().sum()), randomness="different")(x[None])[0],
    "is_grads_batched": batched,
    "vectorize": vectorised,
    "vmap of a backward": batched_outside,
}
REMEDY = r"inside a transform.*torch.autograd.grad.*a loop in the place of vmap"
RIGHT = {"bias_act linear", "transposed_conv2d", "interpolate", "row_gradient linear"}


def right_or_refused(call):
    """What call() returns, None where it is refused with the way out."""
    try:
        return call()
    except NotImplementedError as error:
        assert re.search(REMEDY, str(error)), error  # noqa: PT017


@pytest.mark.parametrize("transform", GRADIENTS)
@pytest.mark.parametrize("name", OPS)
def test_gradients_in_transforms_are_right_or_refused(name, transform):
    x, f = OPS[name]
    expected = plain_gradient(f, x)
    assert expected.any()
    found = right_or_refused(lambda: GRADIENTS[transform](f, x))
    if found is not None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found is not None or name not in RIGHT or transform == "vmap of a backward"


@pytest.mark.parametrize("name", OPS)
def test_values_in_transforms_are_right_or_refused(name):
    x, f = OPS[name]
    pair = torch.stack([x, x.flip(0)])
    expected = torch.stack([f(part.clone().requires_grad_()).detach() for part in pair])
    for transform in (
        lambda: vmap(f, randomness="different")(pair),
        lambda: torch.stack([jvp(f, (part,), (part,))[0] for part in pair]),
    ):
        found = right_or_refused(transform)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_the_graph_of_a_batched_gradient_is_right_or_refused(name):
    x, f = OPS[name]

    def slope(*batch):
        leaf = x.clone().requires_grad_()
        y, several = f(leaf).square().sum(), bool(batch)
        g = torch.autograd.grad(y, leaf, torch.tensor(batch or 1.0), create_graph=True, is_grads_batched=several)[0]
        return torch.autograd.grad(g.flatten()[-leaf.numel() :].square().sum(), leaf)[0]

    expected = slope()
    found = right_or_refused(lambda: slope(2.0, 1.0))
    if found is not None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mmd2 energy", "mmd_groups", "bias_act", "upfirdn2d", "r1_penalty"])
def test_second_order_in_transforms_is_refused(name):
    x, f = OPS[name]
    with pytest.raises(NotImplementedError, match=REMEDY):
        hessian(lambda x: f(x).sum())(x)


@pytest.mark.parametrize("name", ["mmd2 gaussian", "mmd_groups", "bias_act", "upfirdn2d", "minibatch_stddev"])
def test_the_ways_out_work(name):
    x, f = OPS[name]
    whole = torch.autograd.functional.jacobian(lambda x: f(x).square().sum(), x)
    torch.testing.assert_close(whole, plain_gradient(f, x))


def test_a_critic_is_called_functionally():
    """Weights that a script holds apart from the module: no transform, and every derivative."""
    D = StyleGAN2Discriminator(16, channel_base=128)
    weights = {name: p.detach().clone().requires_grad_() for name, p in D.named_parameters()}
    images = torch.randn(2, 3, 16, 16)
    penalty = r1_penalty(lambda x: functional_call(D, weights, (x,)), images)
    found = torch.autograd.grad(penalty, list(weights.values()), allow_unused=True)
    expected = torch.autograd.grad(r1_penalty(D, images), list(D.parameters()), allow_unused=True)
    assert any(g is not None and g.any() for g in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


NETWORKS = {
    "StyleGAN2": (lambda: StyleGAN2Generator(16, 8, mapping_layers=2, channel_base=128), (8,)),
    "StyleGAN": (lambda: StyleGANGenerator(16, latent_dim=8, channel_base=128, channel_max=16), (8,)),
    "StyleGAN2's critic": (lambda: StyleGAN2Discriminator(16, channel_base=128), (3, 16, 16)),
    "PGAN's critic": (lambda: PGANDiscriminator(16, channel_base=128), (3, 16, 16)),
    "BigGAN's critic": (lambda: BigGANDiscriminator(32, num_classes=3, channel_width=4, attention=()), (3, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_transforms_are_right_or_refused(name):
    make, shape = NETWORKS[name]
    network, x = make().eval(), torch.randn(2, *shape)

    def loss(weights, x):
        torch.manual_seed(0)
        return functional_call(network, weights, (x,)).square().mean()

    weights = {name: p.detach() for name, p in network.named_parameters()}
    leaves = {name: p.clone().requires_grad_() for name, p in weights.items()}
    expected = torch.autograd.grad(loss(leaves, x), list(leaves.values()), allow_unused=True)
    found = right_or_refused(lambda: grad(loss)(weights, x))
    if found is not None:
        for a, b in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
