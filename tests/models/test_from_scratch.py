"""Every family, from its initial weights through fifty steps of training to a file and back."""

import copy

import pytest
import torch
from torch.nn import functional as F

import minegan_fast as mf
from minegan_fast.models import (
    BigGANDeepGenerator,
    BigGANDiscriminator,
    BigGANGenerator,
    PGANDiscriminator,
    PGANGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    StyleGANDiscriminator,
    StyleGANGenerator,
)

STEPS, BATCH, DECAY = 50, 4, 0.9
NARROW = {"channel_base": 64, "channel_max": 8}

FAMILIES = {
    "biggan": (
        lambda: BigGANGenerator(32, latent_dim=20, class_dim=5, num_classes=3, channel_width=2),
        lambda: BigGANDiscriminator(32, num_classes=3, channel_width=2),
    ),
    "biggan_deep": (  # whose project has no discriminator
        lambda: BigGANDeepGenerator(32, 4, 5, 3, channel_width=4, attention=[], steps=2),
        lambda: BigGANDiscriminator(32, num_classes=3, channel_width=2),
    ),
    "pgan": (lambda: PGANGenerator(8, latent_dim=8, **NARROW), lambda: PGANDiscriminator(8, **NARROW)),
    "stylegan": (lambda: StyleGANGenerator(8, latent_dim=8, **NARROW), lambda: StyleGANDiscriminator(8, **NARROW)),
    "stylegan2": (lambda: StyleGAN2Generator(8, latent_dim=8, **NARROW), lambda: StyleGAN2Discriminator(8, **NARROW)),
}


def discs(count, resolution, labels):
    """Bright discs on dark ground, whose radius tells the class."""
    axis = torch.linspace(-1, 1, resolution)
    radius = 0.3 + 0.2 * labels[:, None, None] + 0.05 * torch.randn(count, 1, 1)
    inside = axis[:, None].square() + axis.square() < radius.square()
    return (inside.float() * 1.6 - 0.8)[:, None].expand(-1, 3, -1, -1).contiguous()


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps(family, tmp_path):
    torch.manual_seed(0)
    G, D = (make().train() for make in FAMILIES[family])
    before = [copy.deepcopy(network.state_dict()) for network in (G, D)]
    optimizer = mf.SparseFinetuner(G, lr=1e-3, betas=(0.0, 0.99), density=1.0, criterion="random", ema_decay=DECAY)
    optimizer.select()
    critic = torch.optim.Adam(D.parameters(), lr=1e-3, betas=(0.0, 0.99))
    expected = {name: p.detach().double() for name, p in G.named_parameters()}
    path_mean = torch.zeros(())

    def fake():
        given = (torch.randint(3, (BATCH,)),) if G.num_classes else ()
        return G(torch.randn(BATCH, G.latent_dim), *given), given

    for step in range(STEPS):
        if hasattr(G, "alpha"):  # the newest resolution fades in
            G.alpha = D.alpha = min(1.0, 2 * step / STEPS)
        labels = torch.randint(3, (BATCH,))
        real, given = discs(BATCH, G.resolution, labels), (labels,) if G.num_classes else ()
        images, drawn = fake()
        loss = F.softplus(D(images.detach(), *drawn)).mean() + F.softplus(-D(real, *given)).mean()
        if step % 16 == 0:
            loss = loss + mf.r1_penalty(lambda x, given=given: D(x, *given), real)
        critic.zero_grad()
        loss.backward()
        critic.step()

        images, drawn = fake()
        generator_loss = F.softplus(-D(images, *drawn)).mean()
        if family.startswith("stylegan") and step % 4 == 0:
            images, latents = G(torch.randn(BATCH, G.latent_dim), return_latents=True)
            penalty, path_mean, _ = mf.path_length_penalty(images, latents, path_mean)
            generator_loss = generator_loss + penalty
        optimizer.zero_grad()
        generator_loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
        assert torch.isfinite(generator_loss)
        for name, p in G.named_parameters():
            if name in expected:
                expected[name] += (1 - DECAY) * (p.detach().double() - expected[name])

    for network, old in zip((G, D), before, strict=True):
        parameters = {name for name, _ in network.named_parameters()} & old.keys()
        assert not {name for name in parameters if torch.equal(network.state_dict()[name], old[name])}

    average = optimizer.ema_model().eval()
    for name, p in average.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-6)

    path = mf.save_model(tmp_path / "trained.safetensors", average, D.eval())
    G2, D2 = mf.load_generator(path), mf.load_discriminator(path)
    z, noise = torch.randn(3, G.latent_dim), {"noise": "constant"} if family.startswith("stylegan") else {}
    given = (torch.tensor([0, 2, 1]),) if G.num_classes else ()
    with torch.no_grad():
        images = average(z, *given, **noise)
        assert torch.equal(G2(z, *given, **noise), images)
        assert torch.equal(D2(images, *given), D(images, *given))
        assert images.shape == (3, 3, G.resolution, G.resolution)
        assert images.std() > 0
