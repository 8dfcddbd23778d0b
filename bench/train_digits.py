"""Makes every file of minegan_fast/data from MNIST: `python bench/train_digits.py --mnist mnist.npz`.

The archive holds uint8 arrays train_images [60000, 28, 28], train_labels, test_images and test_labels. The source GAN
never sees a nine. The three GANs of `SOURCES` start from it and its critic, and each sees its own digits alone. What it
draws between two digits, or has kept of others, a classifier takes out, which is not the one that measures.
`record.json` tells of the runs whose files are shipped.
"""

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from minegan_fast import metrics
from minegan_fast.data import CLASSIFIER, CRITIC, FOLDER, FOURS_AND_SEVENS, GENERATOR, SOURCES, DigitClassifier
from minegan_fast.layers import r1_penalty
from minegan_fast.models import (
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    load_discriminator,
    load_generator,
    save_model,
)
from minegan_fast.training.augment import diff_augment
from minegan_fast.training.images import to_float
from minegan_fast.training.losses import critic_loss, generator_loss

SEED = 9
GAN = {"resolution": 32, "channel_base": 1024, "channel_max": 96, "image_channels": 1}
BATCH, LR, BETAS, R1_GAMMA, R1_EVERY, EMA_HALF_LIFE = 32, 2.5e-3, (0.0, 0.99), 1.0, 16, 200.0
PIXEL_VARIANCE, RECONSTRUCTION_WEIGHT, WARMUP_LR = 0.1, 0.004, 1e-2
ALONE = 300  # the encoder is new, and what it says at first would spoil a generator that has learnt
CLARITY, TEACHER_SEED = 1.0, SEED + 1


def read(archive: str) -> dict[str, torch.Tensor]:
    with np.load(archive) as arrays:
        data = {name: torch.from_numpy(arrays[name]) for name in arrays}
    for split in ("train", "test"):
        data[f"{split}_images"] = F.pad(data[f"{split}_images"], (2, 2, 2, 2))[:, None]
    return data


def train_classifier(data: dict[str, torch.Tensor], epochs: int, seed: int) -> tuple[DigitClassifier, float]:
    torch.manual_seed(seed)
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


def warm_up(generator: StyleGAN2Generator, encoder: Encoder, images: torch.Tensor, steps: int, alone: int = 0) -> None:
    """alone: so many of the steps, the first ones, train the encoder alone."""
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
        if step < alone:
            generator.zero_grad()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"warm-up {step}/{steps} {loss.item():.1f} nats an image", flush=True)


def new_gan() -> tuple[StyleGAN2Generator, StyleGAN2Discriminator]:
    return StyleGAN2Generator(latent_dim=64, style_dim=96, mapping_layers=3, **GAN), StyleGAN2Discriminator(**GAN)


def clearly_one_of(logits: torch.Tensor, digits: tuple[int, ...]) -> torch.Tensor:
    """How far images [B] are from being the digits clearly and equally often, from a classifier's logits [B, 10]: the
    cross entropy of each with the digit that it is most likely to be, and what the entropy of all lacks."""
    own = logits.float().log_softmax(1)[:, list(digits)]
    shares = own.softmax(1).mean(0)
    return -own.amax(1).mean() + math.log(len(digits)) + (shares * shares.log()).sum()


def train_gan(
    generator: nn.Module,
    critic: nn.Module,
    images: torch.Tensor,
    warmup: int,
    steps: int,
    save: Callable,
    alone: int = 0,
    penalty: Callable | None = None,
) -> None:
    """save: takes the averaged generator and the critic, now and then and at the end. alone: as in `warm_up`.
    penalty: of generated images, a scalar that the generator's loss has beside the critic's."""
    encoder = Encoder(generator.latent_dim)
    warm_up(generator, encoder, images, warmup, alone)
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
            if penalty is not None:
                loss_g = loss_g + penalty(fake)
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
            save(average, critic)
        if step % 100 == 0:
            rate = (step + 1) / (time.monotonic() - start)
            losses = f"G {loss_g.item():.3f} D {loss_d.item():.3f} reconstruction {rebuilt.item():.1f}"
            print(f"gan {step}/{steps} {losses} {rate:.2f}/s", flush=True)
    save(average, critic)


def gan_settings(warmup: int, steps: int) -> dict:
    return {
        "warmup": warmup,
        "steps": steps,
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
    }


def of_digits(data: dict[str, torch.Tensor], split: str, digits: tuple[int, ...]) -> torch.Tensor:
    return data[f"{split}_images"][torch.isin(data[f"{split}_labels"], torch.tensor(digits, dtype=torch.uint8))]


@torch.no_grad()
def judged(judge: DigitClassifier, images: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Features [N, 96] of images in [-1, 1], and the share of each digit among them."""
    features = torch.cat([judge(part) for part in images.split(500)])
    predicted = judge.output(features * judge.rms).argmax(1)
    return features, [round(n / len(images), 4) for n in torch.bincount(predicted, minlength=10).tolist()]


@torch.no_grad()
def measured(
    judge: DigitClassifier, path: Path, data: dict[str, torch.Tensor], digits: tuple[int, ...], seed: int
) -> dict:
    """2000 images of a source, as it is shipped, against the test images of its digits. The floor: as many of its
    training images against the same."""
    source = load_generator(path)
    torch.manual_seed(seed)
    fake = torch.cat([source(torch.randn(500, source.latent_dim)).clamp(-1, 1) for _ in range(4)])
    own = of_digits(data, "train", digits)
    seen = to_float(own[torch.randperm(len(own))[:2000]])
    held_out, real_shares = judged(judge, to_float(of_digits(data, "test", digits)))
    features, shares = judged(judge, fake)
    return {
        "kid": round(metrics.kid(features, held_out)[0], 4),
        "kid_floor": round(metrics.kid(judged(judge, seen)[0], held_out)[0], 4),
        "shares_of_digits": shares,
        "own_digits": round(sum(shares[digit] for digit in digits), 4),
        "held_out_images": len(held_out),
        "held_out_shares_of_digits": real_shares,
        "held_out_own_digits": round(sum(real_shares[digit] for digit in digits), 4),
    }


def train_source(
    data: dict[str, torch.Tensor],
    digits: tuple[int, ...],
    warmup: int,
    steps: int,
    teacher: DigitClassifier,
    judge: DigitClassifier,
    path: Path,
) -> dict:
    """Writes one of `SOURCES`, float16 and without its critic. Returns what record.json says of it.

    teacher: the classifier by whose penalty it learns; judge: that which measures it.
    """
    start, seed, images = time.monotonic(), SEED + digits[0], of_digits(data, "train", digits)
    torch.manual_seed(seed)

    def save(average: StyleGAN2Generator, critic: StyleGAN2Discriminator) -> None:
        save_model(path, copy.deepcopy(average).half())

    def penalty(fake: torch.Tensor) -> torch.Tensor:
        return CLARITY * clearly_one_of(teacher.logits(fake), digits)

    networks = load_generator(path.parent / GENERATOR.name), load_discriminator(path.parent / CRITIC.name)
    train_gan(*networks, images, warmup, steps, save, ALONE, penalty)
    return {
        "digits": digits,
        "seed": seed,
        "start": f"{GENERATOR.name} and {CRITIC.name}",
        "training_images": len(images),
        "images_seen": (warmup + steps) * BATCH,
        "warmup_of_encoder_alone": ALONE,
        "clarity_weight": CLARITY,
        "teacher_seed": TEACHER_SEED,
        **gan_settings(warmup, steps),
        "minutes": round((time.monotonic() - start) / 60, 1),
        **measured(judge, path, data, digits, seed),
    }


def write_fours_and_sevens(data: dict[str, torch.Tensor], folder: Path) -> None:
    arrays = {}
    for name, digit in (("fours", 4), ("sevens", 7)):
        own, unseen = (of_digits(data, split, (digit,)) for split in ("train", "test"))
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(SEED))
        arrays[f"target_{name}"] = own[order[:100]].numpy()
        arrays[f"validation_{name}"] = own[order[100:300]].numpy()
        arrays[f"test_{name}"] = unseen[:300].numpy()
    np.savez_compressed(folder / FOURS_AND_SEVENS.name, **arrays)


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
    parts = ["nines", "classifier", "gan", "fours_and_sevens", "sources"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--warmup", type=int, default=3500, help="steps of the autoencoder alone")
    parser.add_argument("--steps", type=int, default=1200, help="adversarial steps after them")
    parser.add_argument("--source-warmup", type=int, default=1500, help="--warmup of each of the three sources")
    parser.add_argument("--source-steps", type=int, default=1600, help="--steps of each of the three sources")
    parser.add_argument("--source", nargs="+", choices=["012", "345", "678"], help="which of them; all by default")
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
        judge, accuracy = train_classifier(data, arguments.epochs, SEED)
        state = {name: tensor.contiguous() for name, tensor in judge.state_dict().items()}
        save_file(state, arguments.out / CLASSIFIER.name)
        record["classifier"] = {"epochs": arguments.epochs, "test_accuracy": round(accuracy, 4)}
    if "gan" in arguments.parts:
        start = time.monotonic()

        def save(average: StyleGAN2Generator, critic: StyleGAN2Discriminator) -> None:
            save_model(arguments.out / GENERATOR.name, average)
            save_model(arguments.out / CRITIC.name, critic)

        torch.manual_seed(SEED)
        train_gan(*new_gan(), of_digits(data, "train", tuple(range(9))), arguments.warmup, arguments.steps, save)
        minutes = round((time.monotonic() - start) / 60, 1)
        record["gan"] = {**gan_settings(arguments.warmup, arguments.steps), "minutes": minutes}
    judge = DigitClassifier()
    judge.load_state_dict(load_file(arguments.out / CLASSIFIER.name))
    judge.eval()
    if "fours_and_sevens" in arguments.parts:
        write_fours_and_sevens(data, arguments.out)
    if "sources" in arguments.parts:
        teacher = train_classifier(data, arguments.epochs, TEACHER_SEED)[0].requires_grad_(False)
        sources = record.get("sources", {})
        for digits, path in SOURCES.items():
            name = "".join(map(str, digits))
            if name in (arguments.source or name):
                steps = arguments.source_warmup, arguments.source_steps
                sources[name] = train_source(data, digits, *steps, teacher, judge, arguments.out / path.name)
                record["sources"] = dict(sorted(sources.items()))
                record_file.write_text(json.dumps(record, indent=2) + "\n")
    source = load_generator(arguments.out / GENERATOR.name)
    with torch.no_grad():
        torch.manual_seed(SEED)
        predicted = judge.logits(source(torch.randn(1000, source.latent_dim))).argmax(1)
    record["source_samples_classified"] = torch.bincount(predicted, minlength=10).tolist()
    record_file.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
