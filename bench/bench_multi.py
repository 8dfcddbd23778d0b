"""Mining several GANs: a step of the miners against the plain formulation, which makes every image of every generator
with a graph and takes the maximum of the scores; and the time that the shares of a mixture take to be solved for."""

import numpy as np
import pytest
import torch
from clock import Provider
from measure import OURS, Case, whole_steps
from torch import nn

from minegan_fast.mining import MultiGenerator
from minegan_fast.mining.mixture import mixture_shares
from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator
from minegan_fast.training.losses import generator_loss

PLAIN = "all with a graph, maximum"
BRANCHES = (2, 4, 8, 16)
SHARES = (8, 64)


class Critic(nn.Module):
    """StyleGAN2's, without what samples see of their batch: in it the two formulations differ."""

    def __init__(self, **settings):
        super().__init__()
        self.critic = StyleGAN2Discriminator(**settings)

    def forward(self, images):
        return self.critic.final_linear[1](self.critic.features(images, group=1))[:, 0]


@pytest.mark.parametrize("branches", BRANCHES)
def test_step(benchmark, device, recorder, pytestconfig, branches):
    """Forward and backward of the miners' loss, the generators and the critic frozen."""
    quick = pytestconfig.getoption("--quick")
    if quick and branches != BRANCHES[0]:
        pytest.skip("--quick")
    resolution, base, batch, turns = (16, 256, 4, 2) if quick else (64, 8192, 16, 5)
    torch.manual_seed(0)
    settings = {"resolution": resolution, "channel_base": base}
    networks = [StyleGAN2Generator(latent_dim=64 if quick else 512, **settings) for _ in range(branches)]
    multi = MultiGenerator(networks).to(device).eval().requires_grad_(False)
    critic = Critic(**settings).to(device).eval().requires_grad_(False)
    trained = multi.mining_parameters()
    for parameter in trained:
        parameter.requires_grad_(True)
    u = torch.randn(batch, multi.input_dim, device=device)

    def gradients(loss):
        slopes = torch.autograd.grad(loss, trained, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, slopes, strict=True)]

    def ours():
        images, _ = multi.best(u, critic, noise="constant")
        return gradients(generator_loss("wgan", critic(images)))

    def plain():
        scores = torch.stack([critic(branch(u, noise="constant")) for branch in multi.branches])
        return gradients(generator_loss("wgan", scores.amax(0)))

    calls = {OURS: ours, PLAIN: plain}
    found, expected = (call() for call in calls.values())
    size = max(float(g.norm()) for g in expected)
    # float32, summed in other orders: of another winner's gradient everything would differ.
    assert all((a - b).norm() <= 1e-3 * size for a, b in zip(found, expected, strict=True))
    shape = [branches, batch, 3, resolution, resolution]
    recorder.add(whole_steps({"op": "multi", "pass": "step", "shape": shape, "dtype": "float32"}, calls, device, turns))
    benchmark.pedantic(ours)


def projected_gradient(K, b, steps=2000):
    """The simplest that reaches some digits: FISTA, each step sorted onto the simplex (Duchi et al. 2008)."""
    p = ahead = np.full(len(b), 1 / len(b))
    rate, momentum = 1 / np.linalg.eigvalsh(K)[-1], 1.0
    for _ in range(steps):
        x = ahead - rate * (K @ ahead - b)
        ordered = np.sort(x)[::-1]
        excess = (np.cumsum(ordered) - 1) / np.arange(1, len(x) + 1)
        step = np.maximum(x - excess[(ordered > excess).nonzero()[0][-1]], 0)
        momentum, last = (1 + (1 + 4 * momentum**2) ** 0.5) / 2, momentum
        ahead, p = step + (last - 1) / momentum * (step - p), step
    return p


@pytest.mark.parametrize("branches", SHARES)
def test_shares(compare, device, branches):
    """On the CPU, wherever the features are: half of the branches have a share."""
    if device != "cpu":
        pytest.skip("the shares are solved for on the CPU")
    random = np.random.default_rng(0)
    points = random.normal(size=(branches, 2 * branches))
    K = points @ points.T / points.shape[1]
    b = K @ random.dirichlet(np.full(branches, 0.2)) + 0.02 * random.normal(size=branches)

    def value(p):
        return (torch.tensor(p @ K @ p - 2 * p @ b, dtype=torch.float64),)

    # Of the minimum the value: it is what an iteration, too, knows to some digits.
    expected = value(projected_gradient(K, b, 20000))
    row = Case("multi", "shares", (branches,), torch.float64, bytes=K.nbytes, expected=expected, yardstick=OURS)
    row.rounding = 1e-9
    providers = [
        Provider(OURS, lambda: lambda: value(mixture_shares(K, b))),
        Provider("projected gradient", lambda: lambda: value(projected_gradient(K, b))),
    ]
    compare(row, providers)
