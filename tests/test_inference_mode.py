"""torch.inference_mode over every op and every network, plain and held: the same bits as under no_grad, and training
goes on as if nothing had been."""

import copy

import pytest
import torch
from torch import nn

from minegan_fast import SparseFinetuner, models
from minegan_fast.finetune.neurons import compact
from minegan_fast.layers import dragan_penalty, gradient_penalty, r1_penalty
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

SMALL = {"channel_base": 256, "channel_max": 16}
Z, LABELS = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NETWORKS = {
    "StyleGAN2": (lambda: models.StyleGAN2Generator(32, latent_dim=16, **SMALL), (Z,)),
    "StyleGAN2, residual": (lambda: models.StyleGAN2Generator(32, 16, architecture="resnet", **SMALL), (Z,)),
    "StyleGAN2's critic": (lambda: models.StyleGAN2Discriminator(32, **SMALL), (IMAGES,)),
    "StyleGAN": (lambda: models.StyleGANGenerator(32, latent_dim=16, **SMALL), (Z,)),
    "StyleGAN's critic": (lambda: models.StyleGANDiscriminator(32, **SMALL), (IMAGES,)),
    "PGAN": (lambda: models.PGANGenerator(32, latent_dim=16, **SMALL), (Z,)),
    "PGAN's critic": (lambda: models.PGANDiscriminator(32, **SMALL), (IMAGES,)),
    "BigGAN": (
        lambda: models.BigGANGenerator(32, latent_dim=16, class_dim=5, num_classes=4, channel_width=4, attention=(16,)),
        (Z, LABELS),
    ),
    "BigGAN's critic": (
        lambda: models.BigGANDiscriminator(32, num_classes=4, channel_width=8, attention=(16,)),
        (IMAGES, LABELS),
    ),
    "BigGAN-deep": (
        lambda: models.BigGANDeepGenerator(128, latent_dim=16, class_dim=5, num_classes=4, channel_width=4),
        (Z, LABELS),
    ),
}


def of_a_copy(net, inputs):
    """What the network returns under no_grad, itself untouched."""
    torch.manual_seed(1)
    with torch.no_grad():
        return copy.deepcopy(net)(*inputs)


def assert_same_bits(net, inputs):
    expected = of_a_copy(net, inputs)
    torch.manual_seed(1)
    with torch.inference_mode():
        found = net(*inputs)
    assert found.is_inference()
    assert torch.equal(found, expected)


def train(net, inputs, optimizer):
    optimizer.zero_grad()
    net(*inputs).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("held", [False, True], ids=["plain", "held"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, held, training):
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    net = make().train(training)
    if held:
        optimizer = SparseFinetuner(net, lr=1e-3, optimizer="sgd", criterion="random", density=0.3)
        optimizer.select()
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    assert_same_bits(net, inputs)
    before = of_a_copy(net, inputs)
    train(net, inputs, optimizer)
    assert not torch.equal(of_a_copy(net, inputs), before)
    assert_same_bits(net, inputs)  # the leaves' new rows are in the weights
    if held:
        optimizer.verify()
    net.load_state_dict({k: v * 1.25 if v.is_floating_point() else v for k, v in net.state_dict().items()})
    assert_same_bits(net, inputs)  # and what was loaded is seen
    assert not any(t.is_inference() for t in (*net.parameters(), *net.buffers()))
    train(net, inputs, optimizer)
    if held:
        for leaf in optimizer.parameters():
            assert torch.equal(compact(leaf.link.weight.detach(), leaf.link.axis, leaf.link.rows), leaf)
        optimizer.release()
        assert_same_bits(net, inputs)


W, KERNEL, BIAS, ONE = torch.randn(4, 3, 3, 3), torch.tensor([1.0, 2.0, 1.0, 0.5]), torch.randn(3), torch.tensor(0.7)
OPS = {
    **{
        f"mmd2 {kernel}": lambda x, kernel=kernel: mmd2(x[:, 0, :, :5].flatten(1), x[:, 1, :, :5].flatten(1), kernel)
        for kernel in ("gaussian", "laplacian", "polynomial", "energy")
    },
    "mmd_groups": lambda x: mmd_groups([x[:, 0, 0]], MmdTarget([x[:, 1, 0]], 1.0)),
    "miner": lambda x: miner([Chain(x[:, 0, 0], [x[0, :2, 0]], [x[0, 0, 0, :2]])])[0],
    "bias_act": lambda x: bias_act(x, BIAS, act="lrelu"),
    "upfirdn2d": lambda x: upfirdn2d(x, KERNEL, up=2, padding=2),
    "modulated_conv2d": lambda x: modulated_conv2d(x, W, x[:, :, 0, 0]),
    "modulated_conv2d up": lambda x: modulated_conv2d(x, W, x[:, :, 0, 0], up=True, kernel=KERNEL, act="lrelu"),
    "modulated_conv2d down": lambda x: modulated_conv2d(x, W, x[:, :, 0, 0], down=True, kernel=KERNEL, gain=0.5),
    "minibatch_stddev": lambda x: minibatch_stddev(x, 2),
    "noise_bias_act": lambda x: noise_bias_act(x, None, x[:1, :1], ONE, BIAS, act="lrelu"),
    "transposed_conv2d": lambda x: transposed_conv2d(x, W[:3]),
    "interpolate": lambda x: interpolate(x, -x, 0.3),
    "row_gradient": lambda x: row_gradient(x, x[:, :2, 1:-1, 1:-1], (3, 3)),
}  # fmt: skip
CRITIC = nn.Sequential(nn.Conv2d(3, 4, 6), nn.Softplus(), nn.Flatten(), nn.Linear(2916, 1))
PENALTIES = {
    "r1": r1_penalty,
    "gradient": lambda D, x: gradient_penalty(D, x, -x, generator=torch.Generator().manual_seed(2)),
    "dragan": lambda D, x: dragan_penalty(D, x, generator=torch.Generator().manual_seed(2)),
}
OPS |= {f"{name} penalty": lambda x, f=f: f(CRITIC, x) for name, f in PENALTIES.items()}


@pytest.mark.parametrize("name", OPS)
def test_ops(name):
    """On tensors from outside the mode and from inside it."""
    with torch.no_grad():
        expected = OPS[name](IMAGES)
    with torch.inference_mode():
        for x in (IMAGES, IMAGES.clone()):
            assert torch.equal(OPS[name](x), expected)
    x = IMAGES.clone().requires_grad_()
    if "penalty" not in name:
        OPS[name](x).sum().backward()
        assert x.grad.any()


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_train_on_images_and_conditions_of_the_mode(name):
    """As where a frozen network or a loader made them."""

    def critic(x, y):
        return CRITIC(x)[:, 0] * table(y).sum(1)

    table = nn.Embedding(3, 2)
    with torch.inference_mode():
        images, labels = IMAGES.clone(), LABELS.clone()
    got, want = [], []
    for x, y, grads in ((images, labels, got), (IMAGES, LABELS, want)):
        function = {"r1": r1_penalty, "gradient": gradient_penalty, "dragan": dragan_penalty}[name]
        arguments = (x, -x) if name == "gradient" else (x,)
        torch.manual_seed(0)
        value = function(critic, *arguments, condition=y)
        grads.extend(torch.autograd.grad(value, [CRITIC[0].weight, table.weight]))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
