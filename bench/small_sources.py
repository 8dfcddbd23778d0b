"""Small sources of the paper's families: `python bench/small_sources.py biggan --data mnist.npz --out G.safetensors`.

Trains a BigGAN (conditional), a Progressive GAN or a StyleGAN of 32 x 32 pixels from scratch, and writes generator and
critic into one file, which `mf.transfer` reads. The archive holds uint8 arrays train_images [N, H, W] or [N, H, W, 3]
of at most 32 pixels, which are padded with zeros, and train_labels [N]; it may hold test_images and test_labels. The
class --leave-out is never seen: the source can be adapted to it. A sample grid (.png) and a record (.json) come beside
the file, and every minute the state (.resume.pt), from which the same command goes on.

An adversarial loss alone loses most classes in so few minutes. Where a recipe has a `warmup`, the generator and an
encoder are an autoencoder for that share of the time, and its loss then keeps a small weight (`train_digits.py`).
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_digits import Encoder, reconstruction

import minegan_fast as mf
from minegan_fast import models
from minegan_fast.data import classifier
from minegan_fast.files.atomic import atomic_path
from minegan_fast.training.images import to_float
from minegan_fast.training.losses import critic_loss, generator_loss
from minegan_fast.training.plots import save_grid

RESOLUTION, BATCH, LATENT = 32, 32, 64
EMA_HALF_LIFE, R1_EVERY, LEAST_RATE = 200.0, 16, 0.2
STATE_EVERY, CURVE_POINTS, SAMPLES, STATISTICS_BATCHES = 60.0, 100, 1000, 20
CHANNELS = {  # of BigGAN those of its generator and of its critic, of the others those at every resolution
    "biggan": ((96, 96, 64, 32), (32, 64, 96, 96)),
    "pgan": {4: 96, 8: 96, 16: 64, 32: 32},
    "stylegan": {4: 96, 8: 96, 16: 48, 32: 24},
}


@dataclass(frozen=True)
class Recipe:
    """networks: (image channels, classes) -> generator, critic; warmup: a share of the time; mapping_lr: a factor."""

    networks: Callable[[int, int], tuple[nn.Module, nn.Module]]
    loss: str
    generator_lr: float
    critic_lr: float
    r1_gamma: float = 0.0
    mapping_lr: float = 1.0
    warmup: float = 0.0
    warmup_lr: float = 0.0
    reconstruction_weight: float = 0.0


def biggan(channels: int, classes: int) -> tuple[nn.Module, nn.Module]:
    sizes = {"resolution": RESOLUTION, "num_classes": classes, "image_channels": channels}
    generator = models.BigGANGenerator(latent_dim=LATENT, class_dim=32, channels=CHANNELS["biggan"][0], **sizes)
    return generator, models.BigGANDiscriminator(channels=CHANNELS["biggan"][1], **sizes)


def pgan(channels: int, classes: int) -> tuple[nn.Module, nn.Module]:
    sizes = {"image_channels": channels, "channels": CHANNELS["pgan"]}
    return models.PGANGenerator(RESOLUTION, LATENT, **sizes), models.PGANDiscriminator(RESOLUTION, **sizes)


def stylegan(channels: int, classes: int) -> tuple[nn.Module, nn.Module]:
    sizes = {"image_channels": channels, "channels": CHANNELS["stylegan"]}
    generator = models.StyleGANGenerator(RESOLUTION, LATENT, mapping_layers=3, style_dim=96, **sizes)
    return generator, models.StyleGANDiscriminator(RESOLUTION, **sizes)


ADVERSARIAL = {"loss": "nonsaturating", "generator_lr": 2.5e-3, "critic_lr": 2.5e-3}
AUTOENCODER = {"warmup_lr": 1e-2, "reconstruction_weight": 0.004}
RECIPES = {
    "biggan": Recipe(biggan, "hinge", generator_lr=5e-4, critic_lr=1e-3),
    "pgan": Recipe(pgan, **ADVERSARIAL, **AUTOENCODER, r1_gamma=1.0, warmup=0.4),
    "stylegan": Recipe(stylegan, **ADVERSARIAL, **AUTOENCODER, r1_gamma=5.0, warmup=0.5, mapping_lr=0.3),
}


def read(archive: str, leave_out: int) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """{"train", "test"}: images uint8 [N, C, 32, 32] and classes int64 [N] of 0..K-1; and the label of each class.

    Where the archive has no test images, every tenth image is held out. ValueError: arrays that are not as described.
    """
    with np.load(archive) as arrays:
        data = {name: torch.from_numpy(arrays[name]) for name in arrays}
    if not {"train_images", "train_labels"} <= data.keys():
        raise ValueError(f"{archive} holds {sorted(data)}: train_images and train_labels are needed")
    splits = {s: (data[f"{s}_images"], data[f"{s}_labels"].long()) for s in ("train", "test") if f"{s}_images" in data}
    classes = splits["train"][1].unique()
    if leave_out not in classes:
        raise ValueError(f"no image of {archive} has the label {leave_out}: leave out one of {classes.tolist()}")
    classes = classes[classes != leave_out]
    for split, (images, labels) in splits.items():
        shaped = images.ndim > 2 and images.shape[3:] in ((), (3,)) and max(images.shape[1:3]) <= RESOLUTION
        if images.dtype != torch.uint8 or not shaped:
            got = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{split}_images must be uint8 [N, H, W] or [N, H, W, 3] of at most 32 px, got {got}")
        kept = labels != leave_out
        images = images[kept][:, None] if images.ndim == 3 else images[kept].permute(0, 3, 1, 2)
        high, wide = (RESOLUTION - n for n in images.shape[2:])
        images = F.pad(images, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        splits[split] = images, torch.searchsorted(classes, labels[kept])
    if "test" not in splits:
        images, labels = splits["train"]
        held = torch.arange(len(images)) % 10 == 9
        splits = {"train": (images[~held], labels[~held]), "test": (images[held], labels[held])}
    return splits, classes


class Training:
    """Networks, their average and their optimizers; `step` takes one step, `state` and `restore` keep all of it."""

    def __init__(self, family: str, images: Tensor, labels: Tensor, seed: int):
        torch.manual_seed(seed)
        self.recipe, self.images, self.labels = RECIPES[family], images, labels
        classes = int(labels.max()) + 1
        self.generator, self.critic = self.recipe.networks(images.shape[1], classes)
        self.average = copy.deepcopy(self.generator)
        self.conditional = bool(self.generator.num_classes)
        self.encoder = Encoder(LATENT)
        if images.shape[1] != 1:
            self.encoder.convs[0] = nn.Conv2d(images.shape[1], 32, 3, stride=2, padding=1)
        self.steps, self.seconds, self.curve = 0, 0.0, []

        def making(lr: float, encoder_lr: float, betas: tuple[float, float]) -> torch.optim.Adam:
            parts = {True: [], False: []}
            for name, p in self.generator.named_parameters():
                parts[name.startswith("style.")].append(p)  # the mapping network of a StyleGAN
            groups = [{"params": parts[False]}, {"params": self.encoder.parameters(), "lr": encoder_lr}]
            groups += [{"params": parts[True], "lr": lr * self.recipe.mapping_lr}] if parts[True] else []
            return torch.optim.Adam(groups, lr, betas=betas, fused=True)

        self.optimizers = {
            "warmup": making(self.recipe.warmup_lr, 1e-3, (0.9, 0.99)),
            "making": making(self.recipe.generator_lr, 2e-4, (0.0, 0.99)),
            "judging": torch.optim.Adam(self.critic.parameters(), self.recipe.critic_lr, betas=(0.0, 0.99), fused=True),
        }
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["first_lr"] = group["lr"]
        self.r1 = mf.LazyPenalty(mf.r1_penalty, R1_EVERY, self.recipe.r1_gamma / 2)

    def parts(self) -> dict:
        return {name: getattr(self, name) for name in ("generator", "critic", "average", "encoder")} | self.optimizers

    def state(self) -> dict:
        progress = {"steps": self.steps, "seconds": self.seconds, "curve": self.curve, "rng": torch.get_rng_state()}
        return {name: part.state_dict() for name, part in self.parts().items()} | progress

    def restore(self, state: dict) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.steps, self.seconds, self.curve = state["steps"], state["seconds"], state["curve"]
        torch.set_rng_state(state["rng"])

    def step(self, progress: float) -> dict[str, float]:
        """One step at that share of the whole training, 0..1. Returns the losses."""
        index = torch.randint(len(self.images), (BATCH,))
        real, given = to_float(self.images[index]), (self.labels[index],) if self.conditional else ()
        warmup = self.recipe.warmup
        if progress < warmup:
            losses = self._rebuild(real, given, progress / warmup)
        else:
            losses = self._compete(real, given, (progress - warmup) / (1 - warmup))
        self._follow()
        self.steps += 1
        return losses

    def _descend(self, name: str, loss: Tensor, progress: float) -> None:
        """A step of that optimizer, its rates at that share of their fall."""
        optimizer = self.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = group["first_lr"] * (1 - (1 - LEAST_RATE) * progress)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _rebuild(self, real: Tensor, given: tuple, progress: float) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = reconstruction(self.encoder, lambda z: self.generator(z, *given), real)
        self._descend("warmup", loss, progress)
        return {"reconstruction": loss.item()}

    def _compete(self, real: Tensor, given: tuple, progress: float) -> dict[str, float]:
        name, weight = self.recipe.loss, self.recipe.reconstruction_weight
        with torch.autocast("cpu", torch.bfloat16):
            fake = self.generator(torch.randn(BATCH, LATENT), *given)
            loss = generator_loss(name, self.critic(fake, *given))
            if weight:
                loss = loss + weight * reconstruction(self.encoder, lambda z: self.generator(z, *given), real)
        self._descend("making", loss, progress)

        with torch.autocast("cpu", torch.bfloat16):
            # Two passes: the deviation over the batch must not mix real images with generated ones.
            logits = [self.critic(x, *given) for x in (real, fake.detach().float())]
            loss_d = critic_loss(name, *logits)
        self._descend("judging", loss_d + self.r1(self.steps, lambda x: self.critic(x, *given), real), progress)
        means = [x.float().mean().item() for x in logits]
        return {"generator": loss.item(), "critic": loss_d.item(), "real": means[0], "fake": means[1]}

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(0.5 ** (1 / EMA_HALF_LIFE), (self.steps + 1) / (self.steps + 10))
        for a, p in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            a.lerp_(p, 1 - decay)
        for a, b in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            a.copy_(b)

    def averaged(self) -> nn.Module:
        """The average in eval mode, its batch-norm statistics its own."""
        if self.conditional:
            random, y = torch.Generator().manual_seed(0), torch.arange(100) % self.average.num_classes
            draws = ((torch.randn(100, LATENT, generator=random), y) for _ in range(STATISTICS_BATCHES))
            self.average.standing_statistics(draws)
        return self.average.eval()


@torch.no_grad()
def sample(generator: nn.Module, count: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Images [count, C, 32, 32] and, of a conditional generator, their labels, in turn."""
    z = torch.randn(count, generator.latent_dim, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(count) % generator.num_classes if generator.num_classes else None
    noise = {"noise": "constant"} if generator.family == "stylegan" else {}
    parts = [generator(a, *b, **noise) for a, *b in zip(*(x.split(100) for x in (z, y) if x is not None), strict=True)]
    return torch.cat(parts).clamp(-1, 1), y


@torch.no_grad()
def judged(generator: nn.Module, real: Tensor, digits: Tensor) -> dict:
    """Of a grey generator, by the embedded classifier of digits: FID and KID against held-out real images, how many
    samples are taken for each digit, and the share that is taken for the digit of its class, `digits[class]`."""
    if generator.image_channels != 1:
        return {}
    judge, (images, classes) = classifier(), sample(generator, SAMPLES, seed=1)
    real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(1))[:SAMPLES]]
    features, predicted = (judge(images), judge(to_float(real))), judge.logits(images).argmax(1)
    kid, deviation = mf.metrics.kid(*features, subset_size=min(len(real), SAMPLES) // 2)
    record = {"samples": SAMPLES, "real": len(real), "fid": mf.metrics.fid(*features), "kid": kid}
    record |= {"kid_deviation": deviation, "classified": torch.bincount(predicted, minlength=10).tolist()}
    if classes is not None:
        record["of_the_class_asked_for"] = (predicted == digits[classes]).float().mean().item()
    return record


def train(family: str, data: str, out: Path, minutes: float, seed: int = 0, leave_out: int = 9, steps=None) -> dict:
    """Trains for that many minutes of processor time per thread, and at most `steps`; returns the record.

    ValueError: bad settings, or a state beside `out` of others. FileExistsError: `out` is there, finished.
    """
    if family not in RECIPES or not minutes > 0 or out.suffix != ".safetensors":
        raise ValueError(f"a family of {list(RECIPES)}, minutes above 0 and an --out *.safetensors are needed")
    record_file, state_file = out.with_suffix(".json"), out.with_suffix(".resume.pt")
    if record_file.exists():
        raise FileExistsError(f"{record_file} tells of a finished training: choose another --out or remove it")
    settings = {"family": family, "minutes": minutes, "seed": seed, "leave_out": leave_out, "most_steps": steps}
    splits, digits = read(data, leave_out)
    training = Training(family, *splits["train"], seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(f"{state_file} was made with {state['settings']}: give these, or remove it")
        training.restore(state)
        print(f"goes on from step {training.steps}", flush=True)

    def keep() -> None:
        with atomic_path(state_file) as temporary:
            torch.save(training.state() | {"settings": settings}, temporary)
        mf.save_model(out, training.averaged(), training.critic)
        save_grid(out.with_suffix(".png"), sample(training.average, 99, seed=0)[0], 9 if training.conditional else 11)

    budget, before, kept = 60 * minutes, training.seconds, time.monotonic()
    began = time.process_time()
    while (progress := max(training.seconds / budget, training.steps / (steps or float("inf")))) < 1:
        losses = training.step(progress)
        training.seconds = before + (time.process_time() - began) / torch.get_num_threads()
        if len(training.curve) <= CURVE_POINTS * progress:
            training.curve.append({"step": training.steps, "progress": progress, **losses})
            shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            print(f"{family} {training.steps} {progress:.0%} {shown}", flush=True)
        if time.monotonic() - kept > STATE_EVERY:
            keep()
            kept = time.monotonic()
    keep()
    recipe = {name: value for name, value in vars(training.recipe).items() if name != "networks"}
    recipe |= {"batch": BATCH, "ema_half_life": EMA_HALF_LIFE, "r1_every": R1_EVERY, "least_rate": LEAST_RATE}
    record = settings | {"steps": training.steps, "processor_seconds": round(training.seconds), "recipe": recipe}
    for name in ("generator", "critic"):
        record[f"{name}_parameters"] = sum(p.numel() for p in getattr(training, name).parameters())
    record |= {"torch": torch.__version__, "curve": training.curve}
    record |= judged(training.average, splits["test"][0], digits)
    with atomic_path(record_file) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    state_file.unlink()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=list(RECIPES))
    parser.add_argument("--data", required=True, help="npz with train_images and train_labels")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--minutes", type=float, default=12, help="of processor time per thread")
    parser.add_argument("--steps", type=int, help="at most so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leave-out", type=int, default=9, help="the class that the source never sees")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        settings = {name: getattr(arguments, name) for name in ("minutes", "seed", "leave_out", "steps")}
        record = train(arguments.family, arguments.data, arguments.out, **settings)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(json.dumps({name: value for name, value in record.items() if name != "curve"}))


if __name__ == "__main__":
    main()
