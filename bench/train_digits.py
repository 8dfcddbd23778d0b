"""Makes every file of minegan_fast/data from MNIST: `python bench/train_digits.py --mnist mnist.npz`.

The archive holds uint8 arrays train_images [60000, 28, 28], train_labels, test_images and test_labels. The source GAN
never sees a nine. `record.json` tells of the run whose files are shipped.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from minegan_fast.data import CLASSIFIER, CRITIC, FOLDER, GENERATOR, DigitClassifier
from minegan_fast.layers import r1_penalty
from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator, load_generator, save_model
from minegan_fast.training.augment import diff_augment
from minegan_fast.training.images import to_float
from minegan_fast.training.losses import critic_loss, generator_loss

SEED = 9
GAN = {"resolution": 32, "channel_base": 1024, "channel_max": 96, "image_channels": 1}
BATCH, LR, BETAS, R1_GAMMA, R1_EVERY, EMA_HALF_LIFE = 32, 2.5e-3, (0.0, 0.99), 1.0, 16, 200.0
PIXEL_VARIANCE, RECONSTRUCTION_WEIGHT, WARMUP_LR = 0.1, 0.004, 1e-2


def read(archive: str) -> dict[str, torch.Tensor]:
    with np.load(archive) as arrays:
        data = {name: torch.from_numpy(arrays[name]) for name in arrays}
    for split in ("train", "test"):
        data[f"{split}_images"] = F.pad(data[f"{split}_images"], (2, 2, 2, 2))[:, None]
    return data


def train_classifier(data: dict[str, torch.Tensor], epochs: int) -> tuple[DigitClassifier, float]:
    torch.manual_seed(SEED)
    model = DigitClassifier()
    steps = epochs * len(data["train_images"]) // 128
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        index = torch.randint(len(data["train_images"]), (128,))
        images = diff_augment(to_float(data["train_images"][index]), "translation")
        loss = F.cross_entropy(model.logits(images), data["train_labels"][index].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"classifier {step}/{steps} loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        model.rms.copy_(model(to_float(data["train_images"][:10000])).square().mean().sqrt())
        predicted = torch.cat([model.logits(to_float(x)).argmax(1) for x in data["test_images"].split(1000)])
    return model, (predicted == data["test_labels"]).float().mean().item()


class Encoder(nn.Module):
    """Images -> mean and log variance of z. Helps in training only: a generator that can reconstruct every digit keeps
    all of them, where the adversarial loss alone dropped most within a few hundred steps."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in ((1, 32), (32, 64), (64, 96)))
        self.output = nn.Linear(96 * 16, 2 * latent_dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
        return self.output(x.flatten(1)).chunk(2, 1)


def reconstruction(encoder: Encoder, generator: StyleGAN2Generator, real: torch.Tensor) -> torch.Tensor:
    """The negative evidence lower bound of a variational autoencoder (Kingma and Welling 2014), nats an image."""
    mean, log_variance = encoder(real)
    mean, log_variance = mean.float(), log_variance.float().clamp(-10, 5)
    z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
    error = (generator(z).float() - real).square().sum((1, 2, 3)) / (2 * PIXEL_VARIANCE)
    divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1) / 2
    return (error + divergence).mean()


def warm_up(generator: StyleGAN2Generator, encoder: Encoder, images: torch.Tensor, steps: int) -> None:
    mapping = list(generator.style.parameters())
    rest = [p for name, p in generator.named_parameters() if not name.startswith("style.")]
    groups = [  # equalised learning rates make a step of a weight small: by 0.01 more in the mapping network
        {"params": mapping, "lr": 10 * WARMUP_LR},
        {"params": rest, "lr": WARMUP_LR},
        {"params": encoder.parameters(), "lr": 1e-3},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for step in range(steps):
        real = to_float(images[torch.randint(len(images), (BATCH,))])
        with torch.autocast("cpu", torch.bfloat16):
            loss = reconstruction(encoder, generator, real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"warm-up {step}/{steps} {loss.item():.1f} nats an image", flush=True)


def train_gan(images: torch.Tensor, warmup: int, steps: int, folder: Path):
    torch.manual_seed(SEED)
    generator = StyleGAN2Generator(latent_dim=64, style_dim=96, mapping_layers=3, **GAN)
    critic = StyleGAN2Discriminator(**GAN)
    encoder = Encoder(generator.latent_dim)
    warm_up(generator, encoder, images, warmup)
    average = StyleGAN2Generator(**generator.config)
    average.load_state_dict(generator.state_dict())
    making = [{"params": generator.parameters()}, {"params": encoder.parameters(), "lr": 2e-4}]
    optimizers = [torch.optim.Adam(p, LR, betas=BETAS, fused=True) for p in (making, critic.parameters())]
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.2, steps) for o in optimizers]
    decay = 0.5 ** (1 / EMA_HALF_LIFE)
    start = time.monotonic()

    for step in range(steps):
        real = to_float(images[torch.randint(len(images), (BATCH,))])
        with torch.autocast("cpu", torch.bfloat16):
            rebuilt = reconstruction(encoder, generator, real)
            fake = generator(torch.randn(BATCH, generator.latent_dim))
            loss_g = generator_loss("nonsaturating", critic(fake)) + RECONSTRUCTION_WEIGHT * rebuilt
        optimizers[0].zero_grad()
        loss_g.backward()
        optimizers[0].step()

        with torch.autocast("cpu", torch.bfloat16):
            # Two passes: the minibatch standard deviation must not mix real images with generated ones.
            loss_d = critic_loss("nonsaturating", *(critic(x) for x in (real, fake.detach().float())))
        if step % R1_EVERY == 0:
            loss_d = loss_d + R1_GAMMA / 2 * R1_EVERY * r1_penalty(critic, real)
        optimizers[1].zero_grad()
        loss_d.backward()
        optimizers[1].step()

        with torch.no_grad():
            for a, p in zip(average.parameters(), generator.parameters(), strict=True):
                a.lerp_(p, 1 - min(decay, (step + 1) / (step + 10)))
        for schedule in schedules:
            schedule.step()
        if step % 200 == 199:
            save_model(folder / GENERATOR.name, average)
            save_model(folder / CRITIC.name, critic)
        if step % 100 == 0:
            rate = (step + 1) / (time.monotonic() - start)
            losses = f"G {loss_g.item():.3f} D {loss_d.item():.3f} reconstruction {rebuilt.item():.1f}"
            print(f"gan {step}/{steps} {losses} {rate:.2f}/s", flush=True)
    return average.eval(), critic.eval()


def write_nines(data: dict[str, torch.Tensor], folder: Path) -> None:
    own = data["train_images"][data["train_labels"] == 9]
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(SEED))
    (folder / "nines").mkdir(exist_ok=True)
    for i, k in enumerate(order[:100].tolist()):
        Image.fromarray(own[k, 0].numpy()).save(folder / "nines" / f"{i:03d}.png", optimize=True)
    np.savez_compressed(
        folder / "nines.npz",
        validation=own[order[100:400]].numpy(),
        floor=own[order[400:1409]].numpy(),
        test=data["test_images"][data["test_labels"] == 9].numpy(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", required=True, help="npz with train_images, train_labels, test_images, test_labels")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--parts", nargs="+", default=["nines", "classifier", "gan"])
    parser.add_argument("--warmup", type=int, default=3500, help="steps of the autoencoder alone")
    parser.add_argument("--steps", type=int, default=1200, help="adversarial steps after them")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data = read(arguments.mnist)
    record_file = arguments.out / "record.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    record |= {"seed": SEED, "torch": torch.__version__, "machine": f"{platform.machine()}, 1 thread"}

    if "nines" in arguments.parts:
        write_nines(data, arguments.out)
    if "classifier" in arguments.parts:
        judge, accuracy = train_classifier(data, arguments.epochs)
        state = {name: tensor.contiguous() for name, tensor in judge.state_dict().items()}
        save_file(state, arguments.out / CLASSIFIER.name)
        record["classifier"] = {"epochs": arguments.epochs, "test_accuracy": round(accuracy, 4)}
    if "gan" in arguments.parts:
        start = time.monotonic()
        images = data["train_images"][data["train_labels"] != 9]
        source, critic = train_gan(images, arguments.warmup, arguments.steps, arguments.out)
        save_model(arguments.out / GENERATOR.name, source)
        save_model(arguments.out / CRITIC.name, critic)
        record["gan"] = {
            "warmup": arguments.warmup,
            "steps": arguments.steps,
            "warmup_lr": WARMUP_LR,
            "pixel_variance": PIXEL_VARIANCE,
            "reconstruction_weight": RECONSTRUCTION_WEIGHT,
            "batch": BATCH,
            "lr": LR,
            "betas": BETAS,
            "r1_gamma": R1_GAMMA,
            "r1_every": R1_EVERY,
            "ema_half_life_steps": EMA_HALF_LIFE,
            "precision": "bf16 autocast",
            "minutes": round((time.monotonic() - start) / 60, 1),
        }
    judge = DigitClassifier()
    judge.load_state_dict(load_file(arguments.out / CLASSIFIER.name))
    source = load_generator(arguments.out / GENERATOR.name)
    with torch.no_grad():
        torch.manual_seed(SEED)
        predicted = judge.logits(source(torch.randn(1000, source.latent_dim))).argmax(1)
    record["source_samples_classified"] = torch.bincount(predicted, minlength=10).tolist()
    record_file.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
