"""What each of two processes does for test_spread.py, and one process for comparison."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sleeping import StandIn
from tiny_branches import Noisy, Plain, changed, network, stylegan2

from minegan_fast.collectives import average_gradients
from minegan_fast.mining import Mined, Miner, MinerBank, Mixture, MultiGenerator
from minegan_fast.mining.spread import Spread
from minegan_fast.ops import MmdTarget

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
N, B, SEED = 3, 8, 9


def given(generators, spread):
    """What a rank gives: its own generators, None for the others."""
    return [g if spread is None or i in spread.own(len(generators)) else None for i, g in enumerate(generators)]


def plain(spread, **settings):
    generators = [Plain().double().eval() for _ in range(N)]
    miners = [changed(Miner(5).double()) for _ in range(N)]
    return MultiGenerator(given(generators, spread), miners, spread=spread, **settings)


def bank(spread):
    generators = [Plain().double().eval().requires_grad_(False) for _ in range(N)]
    return MultiGenerator(given(generators, spread), changed(MinerBank(N, 5).double()), explore=0.3, spread=spread)


def identity(spread):
    generators = [Plain().double().eval().requires_grad_(False) for _ in range(N)]
    return MultiGenerator(given(generators, spread), spread=spread)


def offloaded(spread):
    generators = [Plain().double().eval().requires_grad_(False) for _ in range(2 * N)]
    miners = [changed(Miner(5).double()) for _ in generators]
    stand_in = None if spread is None else StandIn()
    return MultiGenerator(given(generators, spread), miners, spread=spread, offload=stand_in)


def constants(spread):
    """w and a constant; the noise that the generators draw has no strength."""
    generators = [stylegan2().double() for _ in range(N)]
    for generator in generators:
        for name, parameter in generator.named_parameters():
            if "noise" in name:
                parameter.requires_grad_(False).zero_()
    learned = [torch.randn_like(g.learned_constant) for g in generators]
    places = given(generators, spread) if spread is None else spread.placed(given(generators, spread))
    around = [Mined(g, changed(Miner(7).double()), place="w", constant=c) for g, c in zip(places, learned, strict=True)]
    return MultiGenerator(places, around, spread=spread)


def single(spread):
    """Fewer generators than ranks."""
    return MultiGenerator(given([Plain().double().eval()], spread), [changed(Miner(5).double())], spread=spread)


CASES = {f.__name__: f for f in (single, plain, bank, identity, offloaded, constants)}


def descend(parameters):
    """A step of gradient descent. Making an optimizer of torch imports its compiler, which takes seconds."""
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.05)


def steps(make, spread, part):
    """Some steps of mining, the loss of all images on every rank or a part on each; what all of it gave."""
    torch.manual_seed(SEED)
    multi = make(spread)
    critic = network(1, 8, 8).double()
    parameters = multi.mining_parameters()
    found = {"start": [p.detach().clone() for p in parameters]}
    rows = slice(None) if spread is None or not part else slice(spread.rank, None, spread.size)
    inputs = torch.randn(3, B, multi.input_dim, dtype=torch.float64)
    for step, u in enumerate(inputs.unbind()):
        u.requires_grad_()
        multi.zero_grad()
        critic.zero_grad()
        images, who = multi.best(u, critic)
        judged = images[rows]
        (-critic(judged).mean() + judged.square().mean()).backward()
        if spread is not None:
            spread.share_gradients([*parameters, u])
            average_gradients([{"params": [*critic.parameters()]}], None)
        found[f"images {step}"], found[f"who {step}"], found[f"p {step}"] = images.detach(), who, multi.probabilities
        found[f"u {step}"] = u.grad
        found[f"miners {step}"] = [p.grad.clone() for p in parameters if p.grad is not None]
        found[f"critic {step}"] = [p.grad.clone() for p in critic.parameters()]
        own = range(len(multi)) if spread is None else spread.own(len(multi))
        found[f"generators {step}"] = {
            i: [p.grad.clone() for p in multi.branches[i].generator.parameters() if p.grad is not None] for i in own
        }
        descend(parameters)
    one = torch.zeros(B, dtype=torch.int64)  # one rank makes all of them
    (asked,) = torch.autograd.grad(multi(u, one).sum(), parameters[:1], allow_unused=True)
    if multi.bank is None and spread is not None:
        assert (asked is None) == (spread.rank != 0)
    with torch.no_grad():
        found["judged"] = multi.best(u, critic)
    found["sample"] = multi.sample(7, torch.Generator().manual_seed(4), return_who=True)
    found["another"] = multi.sample(7)
    found["state"] = {k: v.clone() for k, v in multi.mining_state().items()}
    found["random state"] = torch.get_rng_state()
    return found


def mixture(spread):
    """Mining by the kernel distance of the mixture."""
    torch.manual_seed(SEED)
    multi = plain(spread)
    look, parameters = torch.randn(2, 64, 6, dtype=torch.float64), multi.mining_parameters()
    with torch.no_grad():
        like = changed(Plain().double().eval())(torch.randn(20, 5, dtype=torch.float64)).flatten(1)
    target = MmdTarget([like @ w for w in look], 3.0)
    kernel, found = Mixture(N, target, window=3), {}

    def features(i, count=6):
        images = multi.images_of(i, us[i][:count]).flatten(1)
        return [images @ look[0], images @ look[1]]

    def shared(wanted):
        own = [features(i, 6 - i) if i in wanted and i in here else None for i in range(N)]
        return own if spread is None else spread.features(own, target)

    here = range(N) if spread is None else spread.own(N)
    for step in range(5):
        us = torch.randn(N, 6, 5, dtype=torch.float64)
        kernel.update(shared(range(N)))
        multi.zero_grad()
        loss = kernel.loss(shared([i for i in range(N) if kernel.p[i] > 0]))
        loss.backward()
        if spread is not None:
            spread.share_gradients(parameters)
        found[f"p {step}"], found[f"loss {step}"], found[f"K {step}"] = kernel.p, loss.detach(), kernel.K
        found[f"miners {step}"] = [p.grad.clone() for p in parameters if p.grad is not None]
        descend(parameters)
    return found


class Fails(Plain):
    wrong = False

    def forward(self, z):
        if Fails.wrong:
            raise FloatingPointError("only where it is held")
        return super().forward(z)


def failures(spread):
    generators = [Plain().eval(), Fails().eval(), Plain().eval()]
    multi = MultiGenerator(given(generators, spread), [Miner(5) for _ in range(N)], spread=spread)
    u, critic = torch.randn(4, 5), network(1, 8, 8)
    Fails.wrong = True
    for call in (lambda: multi.best(u, critic), lambda: multi(u, torch.tensor([0, 1, 2, 0])), lambda: multi.sample(9)):
        with pytest.raises(FloatingPointError, match=re.escape("only where it is held")):
            call()
    Fails.wrong = False

    def judge(images):
        if spread.rank == 1:
            raise KeyError("critic")
        return critic(images)

    with pytest.raises(KeyError, match=re.escape("critic")):
        multi.best(u, judge)
    images, _ = multi.best(u, critic)
    images.sum().backward()
    assert multi.images_of(spread.rank, u).shape == images.shape
    with pytest.raises(ValueError, match=r"generator \d \(\w+\) is not held by this rank, which has \[[02, ]+\]|\[1\]"):
        multi.images_of(1 - spread.rank, u)
    with pytest.raises(NotImplementedError, match=re.escape("leave create_graph=True out")):
        torch.autograd.grad(multi(u).sum(), multi.mining_parameters(), create_graph=True, allow_unused=True)
    with pytest.raises(ValueError, match=re.escape("rank 1 of 2 holds generator 1, and was not given it")):
        MultiGenerator([Plain(), None, Plain()], [Miner(5) for _ in range(N)], spread=spread)
    with pytest.raises(ValueError, match=re.escape("the ranks were given [3, 4] generators")):
        MultiGenerator([Plain() for _ in range(N + spread.rank)], spread=spread)
    with pytest.raises(
        ValueError, match=re.escape("generator 1 (Plain) makes images [1, 16, 16], generator 0 (Plain) [1, 8, 8]")
    ):
        MultiGenerator(given([Plain(), Plain(16), Plain()], spread), spread=spread)
    target = MmdTarget([torch.randn(5, 3)], 1.0)
    with pytest.raises(ValueError, match=re.escape("branch 1 has groups of [4] dimensions, not [3]")):
        spread.features([None, [torch.randn(2, 4)] if spread.rank else None], target)
    with pytest.raises(TypeError, match=re.escape("the features of branch 0 are float64, the target float32")):
        spread.features([None if spread.rank else [torch.randn(2, 3).double()], None], target)
    with pytest.raises(ValueError, match=re.escape("the features of branch 1 come from rank 1")):
        spread.features([None, [torch.randn(2, 3)]], target)


def noise(spread):
    """A generator that draws: the ranks agree, the second pass makes what the first made, and the draws go on."""
    torch.manual_seed(SEED)
    generators = [kind().double().eval() for kind in (Noisy, Plain, Plain)]
    multi = MultiGenerator(given(generators, spread), changed(MinerBank(N, 5).double()), explore=0.5, spread=spread)
    u, critic = torch.randn(B, 5, dtype=torch.float64), network(1, 8, 8).double()
    found = [multi.best(u, critic)[0].detach() for _ in range(3)]
    with torch.no_grad():
        found += [multi.best(u, critic)[0], multi(u, torch.arange(B) % N), multi(u, torch.arange(B) % N)]
    found += [multi.sample(B, torch.Generator().manual_seed(2)) for _ in range(2)]
    assert not torch.equal(found[4], found[5])
    assert torch.equal(found[6], found[7])
    return [*found, torch.get_rng_state()]


def apart(spread):
    """Ranks that draw other numbers."""
    torch.manual_seed(spread.rank)
    generators = [Plain().double().eval() for _ in range(N)]
    multi = MultiGenerator(given(generators, spread), [Miner(5).double() for _ in range(N)], explore=0.5, spread=spread)
    torch.manual_seed(SEED)
    u, critic = torch.randn(4 * B, 5, dtype=torch.float64), network(1, 8, 8).double()
    torch.manual_seed(spread.rank)
    found = [*multi.mining_state().values(), *multi.best(u, critic, count=False)]
    return [t.detach() for t in (*found, *multi.sample(B, return_who=True), multi(u))]


def main(rank: int, port: int, folder: str):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": LOOPBACK}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    spread = Spread()
    found = {(name, part): steps(make, spread, part) for name, make in CASES.items() for part in (False, True)}
    found["mixture"] = mixture(spread)
    found["noise"] = noise(spread)
    found["apart"] = apart(spread)
    failures(spread)
    pair = Spread(dist.new_group([0, 1]))
    found["a group"] = steps(plain, pair, True)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
