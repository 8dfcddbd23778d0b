"""Generators that sleep: the bits are those of generators that do not, and two at most are awake.

Without a GPU the place where they wake is a stand-in. Weights that sleep, and copies that are no longer read, are NaN.
"""

import contextlib
import copy
import weakref

import pytest
import torch
from sleeping import StandIn
from tiny_branches import Noisy, Plain, changed, network, stylegan2
from torch import nn

from minegan_fast import SparseFinetuner
from minegan_fast.mining import Mined, Miner, MinerBank, MultiGenerator, device_bytes, offload


class Trains(nn.Module):
    """One weight trains, the others do not; batch norm counts in training mode."""

    latent_dim = 5

    def __init__(self):
        super().__init__()
        self.inner = Plain()
        self.inner.requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, z):
        return self.gain * self.inner(z)


def frozen(module):
    return module.double().eval().requires_grad_(False)


def constant_mined(generator):
    constant = torch.randn_like(generator.learned_constant)
    return Mined(generator, changed(Miner(7).double()), place="w", constant=constant)


def with_constants():
    generators = [frozen(stylegan2()) for _ in range(3)]
    return generators, [constant_mined(g) for g in generators]


CASES = {
    "batch norm": lambda: ([frozen(Plain()) for _ in range(4)], None),
    "noise and a bank": lambda: ([frozen(Noisy()) for _ in range(3)], changed(MinerBank(3, 5).double())),
    "StyleGAN2, w and a constant": with_constants,
    "one": lambda: ([frozen(Noisy())], None),
    "a weight that trains": lambda: ([Trains().double().eval() for _ in range(3)], None),
}


def both(name):
    """The same MultiGenerator twice, the second with offload, and its stand-in."""
    generators, bank = CASES[name]()
    plain = MultiGenerator(generators, bank)
    changed(nn.ModuleList([p for p in [plain.bank, *[b.miner for b in plain.branches]] if p is not None]))
    stand_in = StandIn()
    other = copy.deepcopy(plain)
    bank = other.bank if other.bank is not None else [*other.branches]
    return plain, MultiGenerator([b.generator for b in other.branches], bank, offload=stand_in), stand_in


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(name):
    plain, offloaded, stand_in = both(name)
    critic, who = network(1, 8, 8).double().requires_grad_(False), torch.arange(9) % len(plain)
    u = torch.randn(9, plain.input_dim, dtype=torch.float64)
    results = []
    for multi in (plain, offloaded):
        torch.manual_seed(3)
        v, found = u.clone().requires_grad_(), []
        for step in range(2):
            images, winners = multi.best(v, critic)
            loss = critic(images).sum() + images.square().mean()
            if step:
                loss = loss + multi(v, who).square().mean()
            loss.backward()
            found += [images.detach(), winners, torch.get_rng_state()]
        trained = [p for p in multi.parameters() if p.requires_grad]
        found += [v.grad, *[torch.zeros(1) if p.grad is None else p.grad for p in trained]]
        images, _ = multi.best(u, critic)
        found += [t for t in torch.autograd.grad(images.sum(), trained, allow_unused=True) if t is not None]
        with torch.no_grad():
            found += [*multi.best(u, critic), multi(u, who)]
        with torch.inference_mode():
            found.append(multi.sample(5, torch.Generator().manual_seed(1)).clone())
        found.append(multi(u, who).detach())
        results.append(found)
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.uint8 or one.isfinite().all()
    assert len(set(winners.tolist())) >= min(len(plain), 2), "a backward has to wake several"
    assert stand_in.most <= 2


def modules(count):
    return [Plain().eval().requires_grad_(False) for _ in range(count)]


def offloaded(generators, bank=None, poison=True):
    """A MultiGenerator whose generators sleep, and its stand-in."""
    stand_in = StandIn(poison)
    multi = MultiGenerator(generators, bank, offload=stand_in)
    multi.runner.offload.rest()
    stand_in.events.clear()
    return multi, stand_in


def test_the_next_one_is_on_its_way_while_one_runs():
    multi, stand_in = offloaded(modules(3))
    for i, branch in enumerate(multi.branches):
        branch.generator.register_forward_pre_hook(lambda *_, i=i: stand_in.events.append(i))
    fetch, arrive, release = (("fetch", 6), ("arrive", 6), ("release", 6))
    images = multi(torch.randn(6, 5), torch.arange(3).repeat(2))
    first, after = [fetch, arrive, fetch, 0], [arrive, release, fetch]
    assert stand_in.events == [*first, *after, 1, arrive, 2]
    stand_in.events.clear()
    images.sum().backward()
    assert stand_in.events == [2, release, fetch, 1, arrive, 0], "backwards, and no copy of what is there"
    stand_in.events.clear()
    multi.best(torch.zeros(6, 5), lambda images: images.flatten(1)[:, 0])
    scoring = [0, release, fetch, 1, *after, 2]
    assert stand_in.events[: len(scoring)] == scoring
    assert stand_in.most == 2


class Saved:
    def __init__(self, tensor):
        self.tensor = tensor


def test_images_keep_no_activation_of_their_generators():
    """They would keep weights too."""
    for stand_in in (None, StandIn()):
        multi, saved = MultiGenerator(modules(3), offload=stand_in), weakref.WeakSet()

        def pack(tensor, saved=saved):
            saved.add(held := Saved(tensor.detach()))  # a result itself would hold its own graph
            return held

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            images, _ = multi.best(torch.randn(32, 5), network(1, 8, 8))
        kept = [held for held in saved if held.tensor.ndim == 4]
        assert bool(kept) == (stand_in is None)
        del kept
        images.sum().backward()
        assert not [held for held in saved if held.tensor.ndim == 4]


def test_what_is_asleep_is_no_number_here():
    """Else the other tests would see nothing."""
    multi, _ = offloaded(modules(2))
    assert all(p.isnan().all() for branch in multi.branches for p in branch.generator.parameters())
    assert multi.branches[0](torch.randn(2, 5)).isnan().all()
    multi(torch.randn(2, 5), torch.tensor([0, 1]))
    assert multi.branches[0](torch.randn(2, 5)).isfinite().all(), "awake until another one needs the place"


def test_a_weight_written_to_while_awake_is_copied_back():
    multi, _ = offloaded(modules(3))
    u, first = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    before = multi(u, first)
    with torch.no_grad():
        multi.branches[0].generator.last.bias.add_(0.3)
    changed_images = multi(u, first).detach()
    assert not torch.equal(before, changed_images)
    multi(u, first + 1), multi(u, first + 2)
    assert torch.equal(multi(u, first), changed_images)


@pytest.mark.parametrize("awake", [False, True])
def test_a_weight_that_trains_stays_until_it_no_longer_does(awake):
    generators = modules(3)
    multi, stand_in = offloaded(generators)
    u, first = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    expected = multi(u, first).detach()
    if not awake:
        multi.runner.offload.rest()
    weight = generators[0].last.weight.requires_grad_(True)
    assert torch.equal(multi(u, first), expected)
    optimizer = torch.optim.Adam([weight], 0.1)
    for _ in range(2):
        multi(u, first).square().sum().backward()
        multi.runner.offload.rest()
        optimizer.step()
    assert weight.isfinite().all()
    trained = multi(u, first).detach()
    assert not torch.equal(trained, expected)
    weight.requires_grad_(False)
    multi.runner.offload.rest()
    assert weight.isnan().all()
    assert torch.equal(multi(u, first), trained)
    assert stand_in.most <= 2


def test_batch_norm_goes_on_counting():
    generators = modules(3)
    plain = MultiGenerator(copy.deepcopy(generators))
    multi, _ = offloaded(generators)
    for m in (plain, multi):
        for branch in m.branches:
            branch.generator.train()
        torch.manual_seed(0)
        for _ in range(2):
            m(torch.randn(9, 5), torch.arange(9) % 3)
    for one, other in zip(plain.buffers(), multi.buffers(), strict=True):
        assert torch.equal(one, other)


def test_neurons_train_in_it():
    """A held weight and its rows."""
    results = []
    for stand_in in (None, StandIn()):
        torch.manual_seed(1)
        generators = [Plain().eval() for _ in range(3)]
        multi = MultiGenerator(generators, offload=stand_in)
        finetuner = SparseFinetuner(generators[:2], density=0.3, criterion="random", lr=0.1)
        finetuner.select()
        u, critic = torch.randn(12, 5), network(1, 8, 8).requires_grad_(False)
        for _ in range(3):
            finetuner.zero_grad()
            images, _ = multi.best(u, critic)
            images.square().sum().backward()
            finetuner.step()
        results.append([images.detach(), *[p.detach() for p in finetuner.parameters()]])
    assert all(map(torch.equal, *results))


def test_under_autocast_too():
    generators, results = [Plain().eval() for _ in range(3)], []
    for stand_in in (None, StandIn()):
        multi = MultiGenerator(copy.deepcopy(generators), [Miner(5) for _ in range(3)], offload=stand_in)
        torch.manual_seed(1)
        critic, u = network(1, 8, 8).requires_grad_(False), torch.randn(8, 5)
        with torch.autocast("cpu", torch.bfloat16):
            images, _ = multi.best(u, critic)
            loss = critic(images).sum()
        loss.backward()
        results.append([images.detach(), *[b.generator.last.weight.grad for b in multi.branches]])
    assert results[0][0].dtype == torch.bfloat16
    for one, other in zip(*results, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_saved_copied_converted_and_loaded():
    multi, _ = offloaded(modules(3), poison=False)
    u, who = torch.randn(6, 5), torch.arange(6) % 3
    expected = multi(u, who).detach()
    state = copy.deepcopy(multi.state_dict())
    other = copy.deepcopy(multi)
    assert torch.equal(other(u, who), expected)
    assert other.runner.offload is not multi.runner.offload
    with torch.no_grad():
        other.branches[1].generator.last.bias.add_(1)
    assert torch.equal(multi(u, who), expected), "a copy has memory of its own"
    fresh, _ = offloaded(modules(3), poison=False)
    fresh(u, who)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(u, who), expected)
    assert torch.equal(fresh(u, who), expected)
    before = multi.before([branch.generator for branch in fresh.branches])
    assert before.branches[0].generator is fresh.branches[0].generator
    assert torch.equal(before(u, who), expected)
    multi.double()
    twice = multi(u.double(), who)
    torch.testing.assert_close(twice.float(), expected)
    assert torch.equal(multi(u.double(), who), twice)
    multi.branches[2].generator.float().double()
    assert torch.equal(multi(u.double(), who), twice)


@pytest.mark.parametrize("begun", [False, True], ids=["asleep", "on its way"])
def test_what_is_given_to_sleeping_weights_counts(begun):
    multi, _ = offloaded(modules(3), poison=False)
    other, _ = offloaded(modules(3), poison=False)
    u, second = torch.randn(4, 5), torch.ones(4, dtype=torch.int64)
    expected, state = other(u, second).detach(), other.state_dict()

    def begin():
        multi.runner.offload.rest()
        if begun:
            with multi.runner.offload.awake(0, following=1):
                pass

    begin()
    multi.load_state_dict(state)
    assert torch.equal(multi(u, second), expected)
    begin()
    bias = multi.branches[1].generator.last.bias
    bias.data = bias.data + 1
    assert not torch.equal(multi(u, second), expected)


def test_a_generator_that_stands_twice_stays_awake():
    generator = modules(1)[0]
    multi, stand_in = offloaded([generator, generator], [Miner(5), changed(Miner(5))])
    images = multi(torch.randn(4, 5), torch.tensor([0, 1, 0, 1]))
    assert images.isfinite().all()
    assert not [count for _, count in stand_in.events if count]


def test_what_is_refused():
    with pytest.raises(ValueError, match="offload is for a GPU, whose memory is short, and the miners are on cpu"):
        MultiGenerator(modules(2), offload="cpu")
    with pytest.raises(ValueError, match="offload must be \"cpu\" or None, got 'disk'"):
        MultiGenerator(modules(2), offload="disk")
    multi, _ = offloaded(modules(2))
    with pytest.raises(ValueError, match="with offload stays on cpu, it cannot go to meta"):
        multi.to("meta")
    images = multi(torch.randn(2, 5), torch.tensor([0, 1]))
    with pytest.raises(NotImplementedError, match="leave create_graph=True out"):
        torch.autograd.grad(images.sum(), multi.mining_parameters(), create_graph=True, allow_unused=True)
    with pytest.raises(ValueError, match=r"generator 1 \(Plain\) or its miner is on meta"):
        MultiGenerator(modules(2), [Miner(5), Miner(5).to("meta")], offload=StandIn())


def test_bytes_on_the_device():
    generators = [Plain(8), Plain(16), Plain(32), Plain(8)]
    for generator in generators:
        generator.requires_grad_(False)
    weights = [sum(p.nbytes for p in g.parameters()) for g in generators]
    buffers = [sum(b.nbytes for b in g.buffers()) for g in generators]
    whole = [a + b for a, b in zip(weights, buffers, strict=True)]
    assert device_bytes(generators) == [sum(whole)]
    assert device_bytes(generators, ranks=2) == [whole[0] + whole[2], whole[1] + whole[3]]
    assert device_bytes(generators, offload=True) == [sum(buffers) + weights[1] + weights[2]]
    assert device_bytes(generators, offload=True, ranks=3) == [buffers[0] + buffers[3] + 2 * weights[0], *whole[1:3]]
    generators[2].requires_grad_(True)
    assert device_bytes(generators, offload=True) == [sum(buffers) + weights[2] + weights[0] + weights[1]]


class Stream:
    """Notes in the order of the host what streams of a GPU are told."""

    def __init__(self, name, events):
        self.name, self.events, self.device = name, events, torch.device("cpu")

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.events.append(f"{self.name} records")
        return self.name

    def wait_event(self, event):
        self.events.append(f"{self.name} waits for what {event} recorded")


def test_the_order_of_copies_on_a_gpu(monkeypatch):
    """By stand-ins for streams: memory that the present stream was to read is not written to before it was read, and
    nothing is read before it was written."""
    events = []
    present = Stream("present", events)
    monkeypatch.setattr(offload.torch.cuda, "Stream", lambda device: Stream("side", events))
    monkeypatch.setattr(offload.torch.cuda, "current_stream", lambda device: present)
    monkeypatch.setattr(offload.torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    memory, host = offload.PinnedMemory(), torch.arange(6.0).view(2, 3).T
    (tensor,), copying = memory.fetch([host], torch.device("cpu"))
    assert torch.equal(tensor, host)
    assert tensor.stride() == host.stride()
    assert events == ["side waits for present", "side records"]
    events.clear()
    memory.arrive([tensor], copying)
    memory.release([tensor], copying)
    assert events == ["present waits for what side recorded"] * 2


@pytest.mark.gpu
def test_on_a_gpu_the_bits_are_the_same_and_the_memory_is_that_of_two():
    def wide():
        return nn.Sequential(nn.Linear(5, 1024), *[nn.Linear(1024, 1024) for _ in range(6)], nn.Linear(1024, 64))

    class Wide(nn.Module):
        latent_dim = 5

        def __init__(self):
            super().__init__()
            self.layers = wide()
            self.register_buffer("gain", torch.full((), 2.0))

        def forward(self, z):
            return self.gain * self.layers(z).view(-1, 1, 8, 8) + torch.randn(len(z), 1, 8, 8, device=z.device)

    generators = [Wide().eval().requires_grad_(False) for _ in range(6)]
    miners = [changed(Miner(5)).cuda() for _ in generators]
    size = sum(p.nbytes for p in generators[0].parameters())
    critic = network(1, 8, 8).cuda().requires_grad_(False)
    u = torch.randn(64, 5, device="cuda")
    found = []
    for place in ("cpu", None):
        own = copy.deepcopy(generators)
        if place is None:
            own = [g.cuda() for g in own]
        multi = MultiGenerator(own, copy.deepcopy(miners), offload=place)
        multi.best(u, critic)[0].sum().backward()  # brings in what libraries allocate once
        multi.zero_grad()
        if place:
            multi.runner.offload.rest()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        for step in range(5):
            torch.manual_seed(step)
            images, who = multi.best(u, critic)
            critic(images).sum().backward()
        if place:
            assert torch.cuda.max_memory_allocated() - start < 2.5 * size
            multi.runner.offload.rest()
            assert all(p.is_pinned() for g in own for p in g.parameters())
        found.append([images.detach(), who, *[p.grad for p in multi.mining_parameters() if p.grad is not None]])
    assert len(found[0]) == len(found[1]) > 2
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_copy_is_complete_before_a_gpu_reads_it():
    """However long the copy takes, and whatever stream the pass runs on."""

    class Large(nn.Module):
        latent_dim = 1

        def __init__(self, value):
            super().__init__()
            self.weight = nn.Parameter(torch.full((64 * 2**20,), float(value)), requires_grad=False)

        def forward(self, z):
            return self.weight[:: 2**20].view(1, 1, 8, 8).expand(len(z), -1, -1, -1) + 0 * z[:, :, None, None]

    multi = MultiGenerator([Large(i) for i in range(4)], [Miner(1).cuda() for _ in range(4)], offload="cpu")
    u = torch.zeros(4, 1, device="cuda")
    for _ in range(5):
        with torch.cuda.stream(torch.cuda.Stream()):
            images = multi(u, torch.arange(4))
            torch.cuda.current_stream().synchronize()
        assert [image.unique().tolist() for image in images] == [[0], [1], [2], [3]]
