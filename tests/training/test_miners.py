"""Where a run mines: its miners start at the source's own distribution, and what cannot be mined is named."""

import pytest
import torch
from tiny_conditional import Conditional, Critic

import minegan_fast as mf
from minegan_fast.mining.prior import own_latents, project
from minegan_fast.models import BigGANDeepGenerator, BigGANGenerator, PGANGenerator, StyleGAN2Generator
from minegan_fast.training.config import TransferConfig
from minegan_fast.training.critics import check_fit, new_critic
from minegan_fast.training.miners import new_mined


def stylegan2():
    return StyleGAN2Generator(8, 6, channel_base=64, channel_max=4, mapping_layers=2, style_dim=7).eval()


@pytest.mark.parametrize("settings", [{}, {"mine": "w"}, {"mine_constant": True}, {"mine": "w", "mine_constant": True}])
def test_before_the_first_step_the_images_are_the_sources(settings):
    generator, u = stylegan2(), torch.randn(3, 6)
    mined = new_mined(TransferConfig(**settings), generator)
    # the mapping network normalises z itself; that it gets z on the sphere may change the last bit
    torch.testing.assert_close(mined(u, noise="none"), generator(u, noise="none"))
    assert (mined.constant is not None) == settings.get("mine_constant", False)


def test_the_class_miner_starts_at_the_distribution_of_the_classes():
    generator = Conditional().eval()
    table = generator.class_embeddings().detach()
    mined = new_mined(TransferConfig(), generator)
    u = torch.randn(200_000, 6)
    y = mined.class_miner(u).detach()
    # 5 numbers of 6 inputs: mean and covariance are those of the table, up to the error of 200,000 samples
    torch.testing.assert_close(y.mean(0), table.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(y.T), torch.cov(table.T, correction=0), rtol=0, atol=0.05)
    assert torch.equal(mined.miner(u), u)


def test_a_named_class_is_where_its_miner_starts():
    generator, u = Conditional().eval(), torch.randn(4, 6)
    mined = new_mined(TransferConfig(mined_class=2), generator)
    assert torch.equal(mined(u), generator(project(u, "sphere"), torch.full((4,), 2)))
    two = new_mined(TransferConfig(mined_class="0,3"), generator).class_miner
    a, b = generator.class_embeddings()[[0, 3]]
    y = two(u)
    torch.testing.assert_close(y - (a + b) / 2, (y - (a + b) / 2) @ torch.outer(a - b, a - b) / (a - b).square().sum())


@pytest.mark.parametrize(
    "make",
    [
        lambda: BigGANGenerator(32, 16, class_dim=5, num_classes=3, channel_width=2, attention=[]),
        lambda: BigGANGenerator(32, 16, num_classes=3, channel_width=2, attention=[], hierarchical=False, shared=False),
        lambda: BigGANDeepGenerator(32, 6, 5, 3, channel_width=4, attention=[], steps=2),
        lambda: PGANGenerator(8, 6, 32, 4, num_classes=3),
    ],
    ids=["BigGAN", "BigGAN without shared embedding", "BigGAN-deep", "PGAN with labels"],
)
def test_every_conditional_family_can_start_at_a_class(make):
    generator = make().eval()
    mined = new_mined(TransferConfig(mined_class=1), generator)
    u = torch.randn(2, generator.latent_dim)
    # sums over a one-hot row and over an embedding's row may round differently
    expected = generator(project(u, "sphere"), torch.tensor([1, 1]))
    torch.testing.assert_close(mined(u), expected, rtol=1e-5, atol=1e-5)
    assert generator.class_embeddings().shape == (3, generator.class_dim)


def test_the_miner_of_z_does_not_depend_on_what_else_is_mined():
    one, other = (new_mined(TransferConfig(**s), stylegan2()) for s in ({}, {"mine_constant": True}))
    assert all(torch.equal(a, b) for a, b in zip(one.miner.parameters(), other.miner.parameters(), strict=True))


def test_the_prior_is_the_familys_or_the_settings():
    assert new_mined(TransferConfig(), stylegan2()).prior == "sphere+moments"
    assert new_mined(TransferConfig(), Conditional()).prior == "sphere+moments"
    config = TransferConfig(mine="w")
    assert new_mined(config, stylegan2()).prior == "moments"
    config.prior = "none"
    assert new_mined(config, stylegan2()).prior == "none"
    config.prior = "sphere"
    with pytest.raises(ValueError, match="the prior sphere is for z"):
        new_mined(config, stylegan2())


def test_w_is_compared_with_the_mapping_before_it_trains():
    generator = stylegan2()
    expected = own_latents(generator, "w")
    mined = new_mined(TransferConfig(mine="w"), generator)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 1
    for a, b in zip(mined.reference[:3], expected[:3], strict=True):
        assert torch.equal(a, b)
    assert new_mined(TransferConfig(), generator).reference is None


def test_new_networks_leave_the_callers_random_state_alone():
    generator, conditional = stylegan2(), Conditional()
    before = torch.get_rng_state()
    new_mined(TransferConfig(), generator)
    new_mined(TransferConfig(mine="w"), generator)
    new_mined(TransferConfig(), conditional)
    new_critic(generator, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


class Unnamed(Conditional):
    class_embeddings = property()  # hasattr says no


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (
            lambda: PGANGenerator(8, 6, 32, 4),
            {"mine": "w"},
            "mine is w, but PGANGenerator has no mapping network",
        ),
        (Conditional, {"mine": "w"}, "mine is w, but Conditional has no mapping network"),
        (lambda: PGANGenerator(8, 6, 32, 4), {"mine_constant": True}, "PGANGenerator has no learned constant to mine"),
        (stylegan2, {"mined_class": 1}, "mined_class is 1, but StyleGAN2Generator has no classes"),
        (Conditional, {"mined_class": "1,4"}, "mined_class is 1,4, but the source's labels are 0 to 3"),
        (Unnamed, {}, r"Unnamed is class-conditional, but has no class_embeddings\(\)"),
    ],
)
def test_what_cannot_be_mined_is_named_before_the_run_begins(run_settings, source, settings, message):
    given = {**run_settings, "source": source(), "critic": Critic(), **settings}
    given["images"] = torch.rand(8, given["source"].image_channels, 8, 8) * 2 - 1
    with pytest.raises(ValueError, match=message):
        mf.transfer(**given)
    assert not run_settings["out"].exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mine": "y"}, "mine must be one of z, w, got 'y'"),
        ({"mined_class": "cat"}, "mined_class takes labels, as in 207 or 207,208; got 'cat'"),
        ({"mined_class": ""}, "mined_class takes labels"),
        ({"mined_class": -1}, "mined_class takes labels"),
        ({"mine_constant": 1}, "mine_constant must be true or false, got 1"),
        ({"mined_class": True}, "mined_class must be a whole number or a text or null, got True"),
    ],
)
def test_settings_that_do_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        TransferConfig(**settings)


def test_a_label_is_one_setting_however_it_is_written():
    assert TransferConfig(mined_class=3).differences(TransferConfig(mined_class="3")) == []


def test_a_critic_of_other_images_is_named(tiny):
    critic = mf.models.StyleGAN2Discriminator(8, channel_base=64, channel_max=8)
    message = (
        r"image_channels is 1 and 3; the critic StyleGAN2Discriminator judges images of 3 channels, "
        r"StyleGAN2Generator makes them of 1 channels"
    )
    with pytest.raises(ValueError, match=message):
        check_fit(tiny["generator"], critic)
    with pytest.raises(ValueError, match=r"resolution is 8 and 16; .* judges images 16 pixels wide"):
        check_fit(tiny["generator"], mf.models.StyleGAN2Discriminator(16, image_channels=1))
