"""Your own training loop with one line changed: `python examples/your_training_loop.py`.

A plain GAN loop that adapts the embedded digits to nines. The optimizer of the generator was torch.optim.Adam.
"""

import argparse

import torch
from torch.nn import functional as F

import minegan_fast as mf
from minegan_fast import data
from minegan_fast.training.images import load_images, to_float


def main(steps: int = 60, batch: int = 16) -> mf.SparseFinetuner:
    torch.manual_seed(0)
    G, D = mf.load_generator(data.GENERATOR), mf.load_discriminator(data.CRITIC)
    images = to_float(load_images(data.TARGET, 32, channels=1).images)

    optimizer_g = mf.SparseFinetuner(G, lr=1e-3, density=0.05)  # was: torch.optim.Adam(G.parameters(), lr=1e-3, ...)
    optimizer_d = torch.optim.Adam(D.parameters(), lr=2e-3, betas=(0.0, 0.99))
    for step in range(steps):
        real = images[torch.randint(len(images), (batch,))]
        fake = G(torch.randn(batch, G.latent_dim))

        loss_d = F.softplus(D(fake.detach())).mean() + F.softplus(-D(real)).mean()
        if step % 16 == 0:
            loss_d = loss_d + 0.15 * 16 * mf.r1_penalty(D, real)
        optimizer_d.zero_grad()
        loss_d.backward()
        optimizer_d.step()

        loss_g = F.softplus(-D(fake)).mean()
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
        if step % 10 == 0:
            print(f"step {step}: loss D {loss_d.item():.3f}, loss G {loss_g.item():.3f}")

    print(optimizer_g.summary())
    optimizer_g.verify()
    return optimizer_g


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
