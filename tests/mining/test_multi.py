"""Several GANs mined together: the winner's images and gradient against the plain formulation, p, samples, errors."""

import copy

import pytest
import torch
from tiny_branches import SMALL, Noisy, Plain, changed, network, stylegan2
from tiny_conditional import Conditional
from torch import nn

from minegan_fast.mining import Mined, Miner, MinerBank, MultiGenerator
from minegan_fast.models import BigGANGenerator, PGANGenerator, StyleGAN2Generator


def mined(generator, miner, *rest, **keywords):
    return Mined(generator.double().eval(), changed(miner.double()), *rest, **keywords)


MIXTURES = {
    "batch norm": lambda: MultiGenerator([Plain().double().eval() for _ in range(3)]),
    "noise": lambda: MultiGenerator([Noisy().double().eval() for _ in range(3)]),
    "a bank": lambda: MultiGenerator([Noisy().double().eval() for _ in range(3)], changed(MinerBank(3, 5).double())),
    "a bank on the sphere": lambda: MultiGenerator(
        [Plain().double().eval() for _ in range(4)], changed(MinerBank(4, 5).double()), prior="sphere"
    ),
    "StyleGAN2": lambda: MultiGenerator([stylegan2().double() for _ in range(2)]),
    "a class, w, a constant, families and sizes": lambda: MultiGenerator(
        [m.generator for m in _families()], _families()
    ),
    "one": lambda: MultiGenerator([Noisy().double().eval()]),
}
_kept = []


def _families():
    if not _kept:
        s, p, b = stylegan2(), PGANGenerator(8, latent_dim=4, image_channels=1, **SMALL), Conditional()
        constant = torch.randn_like(s.learned_constant, dtype=torch.float64)
        _kept.extend([
            mined(s, Miner(7), place="w", constant=constant),
            mined(p, Miner(4), prior="sphere"),
            mined(b, Miner(6), changed(Miner(6, output_dim=5, affine=True).double())),
            mined(Plain(), Miner(5, 2, input_dim=3, residual=False)),
        ])  # fmt: skip
    return _kept


def plain_best(multi, u, critic):
    """All N images of each sample with a graph, and the gather of the maximum."""
    images = torch.stack([
        branch(u[:, : branch.input_dim]) if multi.bank is None else branch.images(z, u)
        for branch, z in zip(multi.branches, multi._latents(u), strict=True)
    ])  # fmt: skip
    who = torch.stack([critic(x).flatten() for x in images]).argmax(0)
    return images[who, torch.arange(len(u))], who


@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("name", MIXTURES)
def test_equals_the_plain_formulation(name, batch):
    _kept.clear()
    multi = changed(MIXTURES[name]()).requires_grad_(True)
    critic = network(1, 8, 8).double().requires_grad_(False)
    u = torch.randn(batch, multi.input_dim, dtype=torch.float64, requires_grad=True)
    for attempt in range(2):  # the second time without a look at whether the images are the same
        state = torch.get_rng_state()
        images, who = multi.best(u, critic)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        expected, winners = plain_best(multi, u, critic)
        if len(multi) > 1:
            assert torch.equal(torch.get_rng_state(), after), "the random state goes on from the first pass"
        assert torch.equal(who, winners)
        torch.testing.assert_close(images, expected)
        wanted = [u, *multi.parameters()]
        ours, theirs = (
            torch.autograd.grad((critic(x) * 3 + x.square().mean((1, 2, 3))[:, None]).sum(), wanted, allow_unused=True)
            for x in (images, expected)
        )
        for one, other, parameter in zip(ours, theirs, wanted, strict=True):
            zero = torch.zeros_like(parameter)
            torch.testing.assert_close(zero if one is None else one, zero if other is None else other)
        assert any(g is not None and g.any() for g in ours[1:]), attempt
    torch.set_rng_state(state)
    with torch.no_grad():
        found, again = multi.best(u, critic)
    assert torch.equal(again, who)
    torch.testing.assert_close(found, expected)


def test_every_branch_wins_in_these_tests():
    multi, critic = MIXTURES["noise"](), network(1, 8, 8).double()
    assert set(multi.best(torch.randn(99, 5).double(), critic)[1].tolist()) == {0, 1, 2}


def saved_bytes(call):
    """The most that a graph keeps: bytes of the tensors that are saved for backward, each memory once."""
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = call()
    return sum(held.values()), kept


def test_memory_is_that_of_one_branch():
    critic, u = network(1, 8, 8).requires_grad_(False), torch.randn(64, 6)
    alone = mine = {}
    for N in (2, 8):
        multi = MultiGenerator([stylegan2().requires_grad_(False) for _ in range(N)])
        multi.best(u, critic)
        weights = sum(p.nbytes for p in multi.parameters())
        mine = saved_bytes(lambda multi=multi: multi.best(u, critic))[0] - weights
        alone = saved_bytes(lambda multi=multi: multi.branches[0](u))[0]
        plain = saved_bytes(lambda multi=multi: plain_best(multi, u, critic))[0] - weights
        assert mine < 1.3 * alone
        assert plain > 0.9 * N * (alone - weights / N)


def test_one_generator_is_a_mined():
    single = mined(Noisy(), Miner(5))
    multi, u = MultiGenerator([single.generator], [single]), torch.randn(4, 5).double()
    for call in (lambda g: g(u), lambda g: g.sample(3, torch.Generator().manual_seed(1)), lambda g: g.sample(3)):
        results = []
        for g in (multi, single):
            torch.manual_seed(5)
            results.append(call(g))
        assert torch.equal(*results)
    critic = network(1, 8, 8).double()
    torch.manual_seed(5)
    expected = single(u)
    torch.manual_seed(5)
    images, who = multi.best(u, critic)
    assert torch.equal(images, expected)
    assert who.tolist() == [0] * 4
    assert multi.probabilities.tolist() == [1.0]


def test_ties_go_to_the_first():
    generator = Plain().eval()
    multi = MultiGenerator([generator, copy.deepcopy(generator)])
    _, who = multi.best(torch.randn(6, 5), network(1, 8, 8))
    assert who.tolist() == [0] * 6


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 1, 2, 2)])
def test_scores_may_be_maps(shape):
    """As those of a critic of patches."""
    multi, linear = MultiGenerator([Plain().eval(), Plain().eval()]), nn.Linear(64, 4)
    u = torch.randn(20, 5)
    wanted = torch.stack([linear(g(u).flatten(1)).mean(1) for g in multi.branches]).argmax(0)

    def critic(images):
        maps = linear(images.flatten(1))
        return maps.view(shape) if len(shape) > 2 else maps.mean(1).view(shape)

    assert torch.equal(multi.best(u, critic)[1], wanted)


class Constant(nn.Module):
    """Images whose pixels are all `value`."""

    latent_dim = 2

    def __init__(self, value, channels=1, size=4):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))
        self.shape = channels, size, size

    def forward(self, z):
        return self.value.expand(len(z), *self.shape) + 0 * z[:, :1, None, None]


def test_p_is_the_running_frequency_of_wins():
    generators = [Constant(0), Constant(0), Constant(0)]
    multi, u = MultiGenerator(generators, decay=0.5), torch.zeros(4, 2)
    assert multi.probabilities.tolist() == [1 / 3] * 3
    for winner in (0, 1, 1):
        for i, generator in enumerate(generators):
            generator.value.data.fill_(i == winner)
        multi.best(u, lambda x: x.flatten(1)[:, 0])
    torch.testing.assert_close(multi.probabilities, torch.tensor([0.25, 1.5, 0]).double() / 1.75)
    with torch.no_grad():
        generators[2].value.fill_(5)
        multi.best(u, lambda x: x.flatten(1)[:, 0])
    multi.best(u, lambda x: x.flatten(1)[:, 0], count=False)
    assert multi.probabilities[2] == 0, "neither a critic's step nor one that is not to count does"
    multi.reset()
    assert multi.probabilities.tolist() == [1 / 3] * 3
    multi.half()
    multi.best(u.half(), lambda x: x.flatten(1)[:, 0])
    assert multi.probabilities.tolist() == [0, 0, 1]
    every = MultiGenerator(generators, decay=1.0)
    for _ in range(3):
        every.best(u.half(), lambda x: x.flatten(1)[:, 0])
    assert every.wins.tolist() == [0, 0, 12]


def test_exploration_gives_samples_to_the_others_and_leaves_p_alone():
    multi = MultiGenerator([Constant(0), Constant(1), Constant(torch.nan)], explore=0.3)
    with pytest.warns(UserWarning, match=r"generator 2 \(Constant\) cannot win 4000 of 4000 samples"):
        images, who = multi.best(torch.zeros(4000, 2), lambda x: x.flatten(1)[:, 0])
    assert torch.equal(images.flatten(1)[:, 0], who.float()), "who says whose image it is"
    # A third of the explored samples goes to each; those of the one that makes NaN stay with the winner.
    assert abs((who == 0).float().mean() - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5
    assert multi.probabilities.tolist() == [0, 1, 0]
    images.sum().backward()
    assert multi.branches[0].generator.value.grad > 0
    everything = MultiGenerator([Constant(0), Constant(1)], explore=1.0)
    assert abs(everything.best(torch.zeros(4000, 2), lambda x: x.flatten(1)[:, 0])[1].float().mean() - 0.5) < 0.04


@pytest.mark.parametrize("where", ["images", "scores", "one pixel"])
def test_nan_never_wins_and_is_named_once(where, recwarn):
    bad = Constant(torch.nan if where == "images" else 9)
    multi = MultiGenerator([Constant(1), bad, Constant(2)])
    pixel = torch.tensor([1.0, torch.inf if where == "one pixel" else 1.0] * 8).view(4, 4)

    def critic(images):
        scores = images.flatten(1)[:, 0]
        return scores.masked_fill(scores == 9, torch.nan) if where == "scores" else scores

    if where == "one pixel":
        bad.register_forward_hook(lambda module, args, images: images * pixel)
    for _ in range(3):
        images, who = multi.best(torch.zeros(5, 2), critic)
        assert who.tolist() == [2] * 5
        assert (images == 2).all()
    assert [str(w.message)[:46] for w in recwarn] == ["generator 1 (Constant) cannot win 5 of 5 sampl"]


def test_no_score_at_all_is_an_error():
    multi = MultiGenerator([Constant(1), Constant(2)])
    with pytest.raises(ValueError, match="for 3 of 5 samples no generator has a score: the critic gives NaN, or"):
        multi.best(torch.zeros(5, 2), lambda x: torch.tensor([1.0, torch.nan, torch.nan, torch.nan, 1.0]))


def test_a_branch_that_wins_everything_is_named_once(recwarn):
    multi = MultiGenerator([Constant(1), Constant(2)])
    for _ in range(30):
        multi.best(torch.zeros(5, 2), lambda x: x.flatten(1)[:, 0])
    (warning,) = recwarn
    assert "generator 1 (Constant) has 100.0 % of the samples" in str(warning.message)
    assert warning.filename == __file__


def test_samples_follow_p_and_a_generator_repeats_them():
    multi = MultiGenerator([Constant(0), Constant(1), Constant(2)])
    multi.wins = torch.tensor([3.0, 0, 1]).double()
    images, who = multi.sample(4000, return_who=True)
    assert torch.equal(images.flatten(1)[:, 0], who.float())
    assert set(who.tolist()) == {0, 2}
    assert abs((who == 0).float().mean() - 0.75) < 0.03
    noisy = MultiGenerator([Noisy().eval(), Noisy().eval()])
    state = torch.get_rng_state()
    one, two = (noisy.sample(6, torch.Generator().manual_seed(3), return_who=True) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one[0], noisy.sample(6, torch.Generator().manual_seed(4)))
    assert not one[0].requires_grad


def test_each_generator_runs_once_on_its_share():
    multi, seen = MultiGenerator([Plain().eval() for _ in range(3)]), []
    for i, branch in enumerate(multi.branches):
        branch.generator.register_forward_hook(lambda module, args, images, i=i: seen.append((i, len(images))))
    u, who = torch.randn(6, 5), torch.tensor([2, 0, 2, 2, 0, 2])
    images = multi(u, who)
    assert seen == [(0, 2), (2, 4)]
    for b in range(6):
        torch.testing.assert_close(images[b], multi.branches[who[b]](u[b : b + 1])[0])


def test_sizes_that_differ_are_resized_if_asked():
    generators = [Plain().eval(), Plain(16).eval(), Plain().eval()]
    with pytest.raises(
        ValueError, match=r"generator 1 \(Plain\) makes images \[1, 16, 16\], generator 0 \(Plain\) \[1, 8"
    ):
        MultiGenerator(generators)
    multi, u = MultiGenerator(generators, resize=16), torch.randn(4, 5)
    images = multi(u, torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(images[1::2], generators[1](u[1::2]))
    enlarged = nn.functional.interpolate(generators[0](u[::2]), (16, 16), mode="bilinear")
    torch.testing.assert_close(images[::2], enlarged)
    assert MultiGenerator(generators, resize=(8, 4)).sample(2).shape == (2, 1, 8, 4)


def test_one_call_of_a_bank_serves_all():
    bank, calls = MinerBank(3, 5, residual=False), []
    multi = MultiGenerator([Plain().eval() for _ in range(3)], bank)
    bank.register_forward_hook(lambda *_: calls.append(1))
    images, _ = multi.best(torch.randn(7, 5), network(1, 8, 8))
    images.sum().backward()
    assert calls == [1]
    assert all(p.grad.any() for p in bank.parameters())
    assert all(p is q for p, q in zip(multi.mining_parameters(), bank.parameters(), strict=True))
    names = [name for name, _ in multi.named_parameters() if "generator" not in name]
    assert names == [f"bank.{name}" for name, _ in bank.named_parameters()]
    other = copy.deepcopy(multi)
    with torch.no_grad():
        for parameter in other.bank.parameters():
            parameter.zero_()
    u, who = torch.randn(3, 5), torch.tensor([0, 1, 2])
    expected = torch.cat([branch.generator(torch.zeros(1, 5)) for branch in multi.branches])
    assert torch.equal(other(u, who), expected), "the copy's branches read the copy's bank"


def test_mining_state_leaves_the_generators_out():
    one, other = (MultiGenerator([Plain().eval() for _ in range(12)]) for _ in range(2))
    changed(one)
    one.best(torch.randn(9, 5), network(1, 8, 8))
    before = copy.deepcopy(other.branches[11].generator.state_dict())
    state = one.mining_state()
    assert {name.split(".")[2] for name in state if "." in name} == {"miner"}
    other.load_mining_state(state)
    assert torch.equal(other.probabilities, one.probabilities)
    assert all(map(torch.equal, other.mining_parameters(), one.mining_parameters()))
    assert all(torch.equal(before[k], t) for k, t in other.branches[11].generator.state_dict().items())
    with pytest.raises(RuntimeError, match="the miners have"):
        other.load_mining_state({})
    with pytest.raises(ValueError, match="the wins are those of 2 generators, and there are 12"):
        other.set_extra_state(torch.zeros(2))


def test_under_autocast_the_gradient_arrives():
    """The passes without a graph convert weights too, and autocast would keep those."""
    generators = [Plain().eval(), Plain().eval()]
    critic, u = network(1, 8, 8), torch.randn(8, 5)
    multi = MultiGenerator(generators)
    with torch.autocast("cpu", torch.bfloat16):
        images, _ = multi.best(u, critic)
        critic(images).sum().backward()
    assert all(p.grad is not None for p in critic.parameters())
    assert sum(p.grad is not None and bool(p.grad.any()) for p in multi.mining_parameters()) >= 2
    for parameter in critic.parameters():
        parameter.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            images, _ = multi.best(u, critic)
        critic(images).sum().backward()
    assert all(p.grad is not None for p in critic.parameters())


def test_making_one_leaves_no_trace():
    generator = Noisy()
    generator.norm.eval()
    before, state = copy.deepcopy(generator.state_dict()), torch.get_rng_state()
    multi = MultiGenerator([generator, Noisy()], [Miner(5), Miner(5)])
    other = torch.get_rng_state()
    torch.set_rng_state(state)
    Noisy(), Miner(5), Miner(5)
    assert torch.equal(torch.get_rng_state(), other)
    assert generator.training
    assert not generator.norm.training
    assert all(torch.equal(before[k], t) for k, t in generator.state_dict().items())
    assert multi.training


def test_a_generator_that_does_not_repeat_itself_is_refused():
    u, critic = torch.randn(9, 5), network(1, 8, 8)
    with pytest.raises(ValueError, match=r"generator \d \(Plain\) made other images .* the second time: .* eval mode"):
        MultiGenerator([Plain(), Plain()]).best(u, critic)

    class OwnNoise(Plain):
        def forward(self, z):
            return super().forward(z) + torch.randn(len(z), 1, 8, 8, generator=source)

    source = torch.Generator()
    with pytest.raises(ValueError, match="draw their noise from torch's default generators"):
        MultiGenerator([OwnNoise().eval(), OwnNoise().eval()]).best(u, critic)


class Unknown(nn.Module):
    def forward(self, z):
        return z[:, :, None, None]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiGenerator([]), "needs at least one generator, got none"),
        (
            lambda: MultiGenerator([Plain(), Plain().to("meta")]),
            r"generator 1 .* or its miner is on meta, generator 0 .* on cpu: move all",
        ),
        (
            lambda: MultiGenerator([Plain(), Plain()], [Miner(5), Miner(5).to("meta")]),
            "generator 1 .* or its miner is on",
        ),
        (
            lambda: MultiGenerator([Plain(), Plain(), Plain(channels=3)], resize=8),
            r"generator 2 \(Plain\) makes images \[3, 8, 8\].*\[1, 8, 8\]: the channels must be the same",
        ),
        (
            lambda: MultiGenerator([Plain(), Plain(16)]),
            r"makes images \[1, 16, 16\].*\[1, 8, 8\]: resize=16 would bring all to one size",
        ),
        (
            lambda: MultiGenerator([Plain(), Conditional()]),
            r"generator 1 \(Conditional\) is class-conditional and has no class miner: give it one in class_miners",
        ),
        (
            lambda: MultiGenerator([Conditional()], [Mined(Conditional(), Miner(6))]),
            r"the Mined in the place of generator 0 \(Conditional\) holds another one",
        ),
        (lambda: MultiGenerator([Plain(), Plain()], [Miner(5)]), "there are 2 generators and 1 miners"),
        (lambda: MultiGenerator([Plain()], class_miners=[None] * 2), "1 generators and 2 class miners"),
        (lambda: MultiGenerator([Plain()], MinerBank(2, 5)), "1 generators and 2 miners"),
        (lambda: MultiGenerator([Plain()], [Miner(4)]), "generator 0 .*: the miner gives 4 numbers, but the generator"),
        (lambda: MultiGenerator([Unknown()]), r"generator 0 \(Unknown\) has no latent_dim, so its miner must be given"),
        (lambda: MultiGenerator([Plain()], decay=0.0), "decay must be above 0, at most 1, and explore from 0 to 1"),
        (lambda: MultiGenerator([Plain()], explore=1.5), "explore from 0 to 1, got 0.99 and 1.5"),
        (lambda: MultiGenerator([Plain(), Plain()])(torch.zeros(2, 4)), r"u must have shape \[B, 5\], got \[2, 4\]"),
        (
            lambda: MultiGenerator([Plain(), Plain()]).best(torch.zeros(5), None),
            r"u must have shape \[B, 5\], got \[5\]",
        ),
        (
            lambda: MultiGenerator([Plain(), Plain()]).best(torch.zeros(3, 5), lambda x: x.mean()),
            r"a score for each of 3 images, got shape \[\]",
        ),
        (lambda: MultiGenerator([Plain(), Plain()])(torch.zeros(2, 5), torch.tensor([0, 2])), "names generator 2, but"),
        (lambda: MultiGenerator([Plain(), Plain()])(torch.zeros(2, 5), torch.tensor([0])), r"each of 2 .*shape \[1\]"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_class_miner_of_a_mined_is_not_given_twice():
    conditional = Conditional()
    branch = Mined(conditional, Miner(6), Miner(6, output_dim=5, residual=False))
    assert MultiGenerator([conditional], [branch]).branches[0] is branch
    with pytest.raises(ValueError, match="has the class miner: leave it out of class_miners"):
        MultiGenerator([conditional], [branch], class_miners=[branch.class_miner])
    beside = MultiGenerator([conditional, Plain(8)], class_miners=[branch.class_miner, None])
    assert beside.branches[0].class_miner is branch.class_miner
    assert beside.input_dim == 6


def test_miners_that_say_no_size_take_all_of_u():
    class Halves(nn.Module):
        def forward(self, u):
            return u[:, 1::2]

    multi = MultiGenerator([Unknown(), Unknown()], [Halves(), nn.Flatten()])
    assert multi(torch.randn(3, 8), torch.tensor([0, 0, 0])).shape == (3, 4, 1, 1)
    with pytest.raises(ValueError, match="has no input_dim"):
        multi.sample(2)


def test_biggan_stylegan2_and_a_module_behind_one():
    biggan = BigGANGenerator(32, latent_dim=16, class_dim=5, num_classes=4, channel_width=4, attention=(16,)).eval()
    style = StyleGAN2Generator(32, latent_dim=8, mapping_layers=2, **SMALL).eval()
    own = Plain(32, channels=3).eval()
    classes = [Miner(16, output_dim=biggan.class_dim, affine=True), None, None]
    multi = MultiGenerator([biggan, style, own], class_miners=classes)
    assert multi.input_dim == 16
    images, who = multi.best(torch.randn(8, 16), network(3, 32, 32))
    assert images.shape == (8, 3, 32, 32)
    images.sum().backward()
    images, who = multi.sample(20, return_who=True)
    assert set(who.tolist()) <= {0, 1, 2}
