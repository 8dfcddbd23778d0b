"""The settings of bench/quality.py: a source GAN, its target images, and the images of the target that no run sees."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import quality_networks as networks
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from minegan_fast import data
from minegan_fast.files.atomic import save_tensors
from minegan_fast.models import load_generator
from minegan_fast.training.images import load_images, to_float, to_uint8

TEST, VALIDATION, LARGEST, SEEDS = 400, 10, 100, 3
# eye GAN: the class that is hidden, by seed; hazel is for tuning
HIDDEN, HIDDEN_FOR_TUNING, HUE = ("blue", "amber", "green"), "hazel", 120
AVATARS = """\
Cartoon avatars are drawn by DiceBear, with Node.js and these packages of npm (the licences differ by style):
  npm install @dicebear/core @dicebear/collection @resvg/resvg-js
For each seed "s0" to "s1199" call createAvatar(style, { seed, size: 64, backgroundColor }).toString(): createAvatar is
in @dicebear/core, the style a member of @dicebear/collection, and backgroundColor
["b6e3f4", "c0aede", "d1d4f9", "ffd5dc", "ffdfbf"]. Render that SVG with new Resvg(svg).render().asPng() and write it to
FOLDER/<style>/00000.png and so on. Styles: avataaars, lorelei, and personas for tuning. Give FOLDER with --data."""


@dataclass(frozen=True)
class Setting:
    """family: "faces" | "digits" | "eyes"; counts: how many target images; critic: whether the source's is given.

    negatives: whether the judge of digits has learnt to tell a digit from its negative. The other one learnt to take
        both for the same.
    """

    name: str
    family: str
    title: str
    counts: tuple[int, ...] = (30, 100)
    critic: bool = False
    every_method: bool = False
    negatives: bool = False


SETTINGS = {
    s.name: s
    for s in (
        Setting("avataaars", "faces", "face GAN to avataaars", (10, 30, 100), every_method=True),
        Setting("lorelei", "faces", "face GAN to lorelei"),
        Setting("nines", "digits", "digits 0 to 8 to nines", (10, 30, 100), critic=True, every_method=True),
        Setting("inverted", "digits", "digits to white paper, without their critic", (30, 100, 1000), negatives=True),
        Setting("hidden", "eyes", "eye GAN to one class that is hidden from it"),
        Setting("hue", "eyes", "eye GAN to its images of other colours"),
    )
}
TUNING = {
    s.family: s
    for s in (
        Setting("personas", "faces", "face GAN to personas", (100,)),
        Setting("flipped", "digits", "digits upside down", (100,), critic=True),
        Setting("hazel", "eyes", "eye GAN to hazel eyes", (100,)),
    )
}


@dataclass(frozen=True)
class Target:
    """uint8 [N, C, R, R] each: to train on; a few more, as a user could set aside; those that judge."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Places:
    """Where things are: avatars' folder, MNIST's archive, what was computed before."""

    cache: Path
    data: Path | None = None
    mnist: Path | None = None

    def judge(self, setting: Setting) -> Path:
        """That of digits; trained on other images where MNIST is not given."""
        words = ["digit_judge", "mnist" if self.mnist else "shipped", *["negatives"] * setting.negatives]
        return self.cache / f"{'_'.join(words)}.safetensors"


def target(setting: Setting, count: int, seed: int, places: Places) -> Target:
    """The same for every method: `count` images, of each seed others (of the shipped nines, other ones of the 100)."""
    train, validation, test = POOLS[setting.name](seed, places, count)
    if count > len(train):
        raise ValueError(f"{setting.name} has {len(train)} images to train on, not {count}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Target(train[order[:count]], validation, test)


def source(family: str):
    """A new copy of the family's generator, or the file that holds it."""
    if family == "digits":
        return str(data.GENERATOR)
    return networks.FaceGenerator().eval() if family == "faces" else networks.EyeGenerator().eval()


def _cut(images: Tensor, seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of many images: those of a seed to train on, a few more, and the last ones, the same for every seed. Of more than
    100 to train on, different seeds share some."""
    need = SEEDS * (LARGEST + VALIDATION) + TEST
    if len(images) < need:
        raise networks.MissingError(f"{need} images are needed, {len(images)} are there")
    if count > LARGEST:
        rest = images[:-TEST]
        return rest[:-VALIDATION], rest[-VALIDATION:], images[-TEST:]
    own = images[(seed % SEEDS) * (LARGEST + VALIDATION) :]
    return own[:LARGEST], own[LARGEST : LARGEST + VALIDATION], images[-TEST:]


def _avatars(style: str):
    @cache
    def images(folder: Path) -> Tensor:
        return load_images(folder, 64).images

    def pool(seed: int, places: Places, count: int) -> tuple[Tensor, Tensor, Tensor]:
        if places.data is None or not (places.data / style).is_dir():
            where = "no folder was given (--data)" if places.data is None else f"no folder {places.data / style}"
            raise networks.MissingError(f"{where} with PNG files of the style {style}.\n{AVATARS}")
        return _cut(images(places.data / style), seed, count)

    return pool


@cache
def digits(mnist: Path | None) -> tuple[Tensor, Tensor]:
    """uint8 [N, 1, 32, 32] and labels: MNIST's training images; without its archive those that the embedded source
    makes, labelled by the embedded classifier, and the shipped nines."""
    if mnist is not None:
        if not mnist.is_file():
            raise networks.MissingError(
                f"no file {mnist}: --mnist takes an npz archive with train_images [60000, 28, 28] and train_labels"
            )
        with np.load(mnist) as arrays:
            images, labels = (torch.from_numpy(arrays[f"train_{name}"]) for name in ("images", "labels"))
        return F.pad(images, (2, 2, 2, 2))[:, None], labels.long()
    made = _generated(load_generator(data.GENERATOR), 9000, 1)
    with torch.no_grad():
        labels = torch.cat([data.classifier().logits(to_float(x)).argmax(1) for x in made.split(500)])
    nines = torch.cat([data.nines("floor"), data.nines("validation")])
    order = torch.randperm(len(made) + len(nines), generator=torch.Generator().manual_seed(2))
    both = torch.cat([made[labels < 9], nines]), torch.cat([labels[labels < 9], torch.full((len(nines),), 9)])
    order = order[order < len(both[0])]
    return both[0][order], both[1][order]


def _nines(seed: int, places: Places, count: int) -> tuple[Tensor, Tensor, Tensor]:
    shipped = load_images(data.TARGET, 32, 1).images
    validation = data.nines("validation")[seed * VALIDATION : (seed + 1) * VALIDATION]
    return shipped, validation, data.nines("test")[:TEST]


def _of_digits(change):
    def pool(seed: int, places: Places, count: int) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = digits(places.mnist)
        return _cut(change(images[labels < 9][:2000]), seed, count)

    return pool


def _of_eyes(labels, change=lambda images: images):
    """Images of the eye GAN itself; labels: seed -> label or None, all of them."""

    def pool(seed: int, places: Places, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return _cut(change(_eyes(labels(seed), places.cache / "eyes")), seed, count)

    return pool


@cache
def _eyes(label: int | None, folder: Path) -> Tensor:
    """Kept in a file: the processes that run cells need them too."""
    path = folder / f"{label}.safetensors"
    if not path.exists():
        count = SEEDS * (LARGEST + VALIDATION) + TEST
        labels = torch.arange(count) % 8 if label is None else torch.full((count,), label)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"images": _generated(networks.EyeGenerator(), count, 3, labels)})
    return load_file(path)["images"]


@torch.no_grad()
def _generated(generator, count: int, seed: int, labels: Tensor | None = None) -> Tensor:
    generator = generator.eval()
    with torch.random.fork_rng([]):  # StyleGAN2 draws its noise too
        torch.manual_seed(seed)
        z = torch.randn(count, generator.latent_dim)
        more = [()] * -(-count // 50) if labels is None else [(part,) for part in labels.split(50)]
        return torch.cat([to_uint8(generator(part, *m)) for part, m in zip(z.split(50), more, strict=True)])


def turned(images: Tensor, degrees: float = HUE) -> Tensor:
    """uint8 [N, 3, H, W] with every hue turned: a rotation around the grey axis, which keeps the mean of R, G and B."""
    angle = torch.tensor(degrees).deg2rad()
    third, root = (1 - angle.cos()) / 3, angle.sin() / 3**0.5
    matrix = torch.full((3, 3), float(third)) + angle.cos() * torch.eye(3)
    matrix += root * torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return torch.einsum("ij,njhw->nihw", matrix, images.float()).round().clamp(0, 255).to(torch.uint8)


def hidden_label(setting: Setting, seed: int) -> int | None:
    """The label that a run of the eye GAN has to find, where there is one."""
    names = {"hidden": HIDDEN[seed % len(HIDDEN)], "hazel": HIDDEN_FOR_TUNING}
    return networks.EyeGenerator.classes.index(names[setting.name]) if setting.name in names else None


POOLS = {
    **{style: _avatars(style) for style in ("avataaars", "lorelei", "personas")},
    "nines": _nines,
    "inverted": _of_digits(lambda images: 255 - images),
    "flipped": _of_digits(lambda images: images.flip(2)),
    "hidden": _of_eyes(lambda seed: hidden_label(SETTINGS["hidden"], seed)),
    "hazel": _of_eyes(lambda seed: hidden_label(TUNING["eyes"], seed)),
    "hue": _of_eyes(lambda seed: None, turned),
}
