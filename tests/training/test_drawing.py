"""Images of seeds, of a checkpoint without a miner, truncated, with one noise, and in between."""

import itertools
from statistics import NormalDist

import pytest
import torch
from tiny_conditional import Conditional

from minegan_fast.mining import Mined, Miner, MultiGenerator
from minegan_fast.models import (
    BigGANDeepGenerator,
    BigGANGenerator,
    PGANGenerator,
    StyleGAN2Generator,
    StyleGANGenerator,
)
from minegan_fast.training.drawing import bare, frames, of_seeds, one_branch, spherical, steer

SIZES = {"resolution": 8, "channel_base": 64, "channel_max": 8, "image_channels": 1}


def noisy(generator):
    """A generator whose noise shows."""
    for name, parameter in generator.named_parameters():
        if "noise" in name:
            torch.nn.init.constant_(parameter, 0.5)
    return generator.eval()


@pytest.fixture(params=[StyleGAN2Generator, StyleGANGenerator])
def stylegan(request):
    torch.manual_seed(0)
    return noisy(request.param(latent_dim=8, mapping_layers=2, **SIZES))


@pytest.fixture
def mined():
    """A StyleGAN2 behind a miner that moves, per place."""

    def make(place="z", constant=False, seed=0):
        torch.manual_seed(seed)
        generator = noisy(StyleGAN2Generator(latent_dim=8, mapping_layers=2, **SIZES))
        miner = Miner(8)
        torch.nn.init.normal_(miner.layers[-1].weight)
        return Mined(
            generator, miner, place=place, constant=generator.learned_constant + 1 if constant else None
        ).eval()

    return make


def drawn(size, seed):
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed))


def test_an_image_is_that_of_its_seed_whatever_the_others_are(stylegan):
    sampler = bare(stylegan)
    state = torch.get_rng_state()
    together, who = of_seeds(sampler, [3, 1, 3])
    assert torch.equal(torch.get_rng_state(), state)
    assert who == [0, 0, 0]
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[1:2], of_seeds(sampler, [1])[0])
    assert not torch.equal(together[0], together[1])
    steer(sampler, noise="none")
    plain = stylegan(drawn(8, 3), noise="none").clamp(-1, 1)
    assert torch.allclose(of_seeds(sampler, [3])[0], plain)


@pytest.mark.parametrize("psi", [0.0, 0.6])
def test_truncation_of_a_checkpoint_is_towards_the_mean_of_its_own_w(stylegan, psi):
    sampler = bare(stylegan)
    (said,) = steer(sampler, truncation=psi, noise="none")
    assert "mean of its own w, over 10,000 draws" in said
    image = of_seeds(sampler, [5])[0]
    z = torch.randn(10_000, 8, generator=torch.Generator().manual_seed(0))
    w = stylegan.mapping(drawn(8, 5)).lerp(stylegan.mapping(z).mean(0, keepdim=True), 1 - psi)
    expected = stylegan.synthesis(w[:, None].expand(-1, stylegan.num_layers, -1), noise="none").clamp(-1, 1)
    assert torch.allclose(image, expected, atol=1e-5)


def test_truncation_takes_the_mean_that_a_file_holds(stylegan):
    stylegan.latent_avg = torch.full((8,), 3.0)
    sampler = bare(stylegan)
    (said,) = steer(sampler, truncation=0.0, noise="none")
    assert "that the file holds" in said
    w = torch.full((1, stylegan.num_layers, 8), 3.0)
    assert torch.allclose(of_seeds(sampler, [5])[0], stylegan.synthesis(w, noise="none").clamp(-1, 1))


@pytest.mark.parametrize("place", ["z", "w"])
@pytest.mark.parametrize("constant", [False, True])
def test_truncation_of_a_run_is_towards_the_mean_of_the_mined_w(mined, place, constant):
    sampler = mined(place, constant)
    (said,) = steer(sampler, truncation=0.5, noise="none")
    assert "mean of the mined w" in said
    generator, miner = sampler.generator, sampler.miner

    def styles(u):
        return miner(generator.mapping(u)) if place == "w" else generator.mapping(miner(u))

    u = torch.randn(10_000, 8, generator=torch.Generator().manual_seed(0))
    w = styles(drawn(8, 2)).lerp(styles(u).mean(0, keepdim=True), 0.5)[:, None].expand(-1, generator.num_layers, -1)
    image = generator.synthesis(w, noise="none", constant=sampler.constant)
    assert torch.allclose(of_seeds(sampler, [2])[0], image.clamp(-1, 1), atol=1e-5)


def test_noise_is_new_constant_or_none(stylegan):
    def twice(noise):
        sampler = bare(stylegan)
        steer(sampler, noise=noise)
        u = drawn(8, 0)
        images = sampler(u), sampler(u)
        stylegan._forward_pre_hooks.clear()
        stylegan._forward_pre_hooks_with_kwargs.clear()
        return images

    one, other = twice("random")
    assert not torch.equal(one, other)
    constant, again = twice("constant")
    assert torch.equal(constant, again)
    assert not torch.equal(constant, twice("none")[0])
    with pytest.raises(ValueError, match="noise must be one of random, constant, none"):
        twice("loud")


def biggan(deep):
    torch.manual_seed(0)
    if not deep:
        return BigGANGenerator(32, class_dim=5, num_classes=4, channel_width=2, attention=()).eval()
    generator = BigGANDeepGenerator(32, 16, 5, 4, channel_width=4, attention=[], steps=3)
    for name, buffer in generator.named_buffers():
        if "running_means" in name:
            buffer.copy_(torch.randn_like(buffer))  # so that the steps differ
    return generator.eval()


@pytest.mark.parametrize("deep", [False, True])
def test_a_biggan_truncates_z(deep):
    generator, seen, normal = biggan(deep), [], NormalDist()
    low = normal.cdf(-2)
    z = drawn(generator.latent_dim, 3)
    within = torch.tensor([[normal.inv_cdf(low + (1 - 2 * low) * normal.cdf(x)) for x in z[0].tolist()]])
    with torch.no_grad():
        keywords = {"truncation": 0.5} if deep else {}
        expected = generator(0.5 * within, torch.tensor([2]), **keywords)
        plain = generator(z, torch.tensor([2]))
    sampler = bare(generator, [2])
    assert torch.allclose(of_seeds(sampler, [3])[0], plain, atol=1e-5)
    (said,) = steer(sampler, truncation=0.5)
    assert "times 0.5" in said
    image = of_seeds(sampler, [3])[0]
    assert torch.allclose(image, expected, atol=1e-5)
    assert (image - plain).abs().max() > 1e-3
    generator.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        sampler(torch.randn(200, generator.latent_dim, generator=torch.Generator().manual_seed(0)))
    assert float(seen[0].abs().max()) <= 1
    shares = [(normal.cdf(x / 0.5) - low) / (1 - 2 * low) for x in seen[0].flatten().sort()[0].tolist()]
    grid = torch.linspace(0, 1, len(shares))
    assert (torch.tensor(shares) - grid).abs().max() < 2 / len(shares) ** 0.5  # Kolmogorov and Smirnov


def test_what_a_biggan_does_not_truncate_is_named():
    generator = biggan(False)
    mined = Mined(generator, Miner(generator.latent_dim), Miner(generator.latent_dim, output_dim=5, affine=True))
    with pytest.raises(ValueError, match="behind a miner is not truncated"):
        steer(mined, truncation=0.5)
    with pytest.raises(ValueError, match=r"truncated by 0 to 1, got -0\.5"):
        steer(bare(generator), truncation=-0.5)
    with pytest.raises(ValueError, match="noise is of StyleGAN"):
        steer(bare(generator), noise="none")


def test_what_a_family_has_not_is_refused_by_name():
    sampler = bare(PGANGenerator(8, latent_dim=8, channel_base=64, channel_max=8))
    assert steer(sampler) == []
    with pytest.raises(ValueError, match=r"truncation is of StyleGAN and StyleGAN2.*pgan has none"):
        steer(sampler, truncation=0.5)
    with pytest.raises(ValueError, match=r"noise is of StyleGAN and StyleGAN2.*pgan has none"):
        steer(sampler, noise="none")
    with pytest.raises(ValueError, match="w is of StyleGAN and StyleGAN2; pgan has none"):
        frames(sampler, [0, 1], 2, space="w")
    with pytest.raises(ValueError, match="has no classes"):
        bare(sampler.generator, [1])


def test_classes_of_a_checkpoint():
    torch.manual_seed(0)
    generator = Conditional().eval()
    for label in (0, 3):
        image = of_seeds(bare(generator, [label]), [7])[0]
        assert torch.allclose(image, generator(drawn(6, 7), torch.tensor([label])), atol=1e-6)
    all_of_them = of_seeds(bare(generator), range(30))[0]
    single = [of_seeds(bare(generator, [label]), range(30))[0] for label in range(4)]
    nearest = torch.stack([(all_of_them - images).abs().flatten(1).amax(1) for images in single]).min(0)
    assert nearest.values.max() < 1e-6
    assert set(nearest.indices.tolist()) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="class 4 is not there: the labels are 0 to 3"):
        bare(generator, [0, 4])
    with pytest.raises(ValueError, match=r"name one \(--class\)"):
        frames(bare(generator), [0, 1], 2)
    assert len(list(frames(bare(generator, [2]), [0, 1], 2))) == 3


@pytest.mark.parametrize(("space", "place"), [("z", "z"), ("z", "w"), ("w", "z"), ("w", "w")])
@pytest.mark.parametrize("loop", [False, True])
def test_frames_go_through_the_images_of_the_seeds(mined, space, place, loop):
    sampler = mined(place, constant=True)
    steer(sampler, truncation=0.7, noise="constant")
    shown = list(frames(sampler, [4, 8, 2], 3, space, loop=loop))
    assert len(shown) == (9 if loop else 7)
    seeds = of_seeds(sampler, [4, 8, 2])[0]
    for i in range(3):
        assert torch.allclose(shown[3 * i], seeds[i : i + 1], atol=1e-5)
    steps = [float((b - a).abs().max()) for a, b in itertools.pairwise(shown)]
    assert min(steps) > 1e-5
    assert not torch.allclose(shown[1], shown[0].lerp(shown[3], 1 / 3), atol=1e-6)  # images are not blended


def test_frames_in_w_are_of_the_w_between(mined):
    sampler = mined()
    steer(sampler, noise="none")
    generator = sampler.generator
    ends = [generator.mapping(sampler.miner(drawn(8, seed))) for seed in (1, 2)]
    middle = list(frames(sampler, [1, 2], 2, "w"))[1]
    assert torch.allclose(middle, generator(ends[0].lerp(ends[1], 0.5), latents=True, noise="none").clamp(-1, 1))


def test_spherical_keeps_the_norm_and_the_pace():
    a, b = torch.tensor([[3.0, 0, 0]]), torch.tensor([[0, 3.0, 0]])
    for t in (0.0, 0.25, 0.5, 1.0):
        angle = torch.tensor(t * torch.pi / 2)
        expected = 3 * torch.stack([angle.cos(), angle.sin(), torch.tensor(0.0)])[None]
        assert torch.allclose(spherical(a, b, t), expected, atol=1e-6)
    assert torch.allclose(spherical(a, 2 * a, 0.5), 1.5 * a)
    assert torch.allclose(spherical(a, -a, 0.25), 0.5 * a)
    assert torch.isfinite(spherical(torch.zeros(1, 3), a, 0.5)).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": [1]}, "from two seeds on, got 1"),
        ({"between": 0}, "at least 1 step"),
        ({"space": "x"}, "space must be z or w"),
        ({"way": "round"}, "way must be spherical or linear"),
    ],
)
def test_wrong_frames_are_named(mined, changed, message):
    with pytest.raises(ValueError, match=message):
        frames(mined(), **({"seeds": [1, 2], "between": 2} | changed))


def test_of_several_sources_one_is_named(mined):
    parts = [mined(seed=seed) for seed in (1, 2)]
    several = MultiGenerator([p.generator for p in parts], parts, names=["faces", "cats"]).eval()
    images, who = of_seeds(several, range(8))
    assert set(who) == {0, 1}
    assert torch.equal(of_seeds(several, [5])[0], images[5:6])
    assert one_branch(several, "cats") is several.branches[1]
    with pytest.raises(ValueError, match=r"name one with --of, faces or cats$"):
        one_branch(several, None)
    with pytest.raises(ValueError, match="got 'dogs'"):
        one_branch(several, "dogs")
    with pytest.raises(ValueError, match="this one has one"):
        one_branch(parts[0], "faces")
    assert len(steer(several, truncation=0.5)) == 1
