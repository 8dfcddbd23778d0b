"""Images as a user asks for them: of seeds, of a checkpoint without a miner, truncated, with one noise, in between."""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..mining import Mined, MultiGenerator
from ..mining.draws import draw_inputs, seeded
from ..models import BigGANDeepGenerator
from ..models.biggan_layers import ConditionalGenerator
from ..models.styles import StyleBased
from .generators import as_generator, class_count
from .miners import Network, branches, class_embeddings

NOISES = ("random", "constant", "none")
SPACES = ("z", "w")
WAYS = ("spherical", "linear")
CENTRE_SAMPLES = 10_000


class Same(nn.Module):
    """The miner of a checkpoint that has none: z = u."""

    def __init__(self, size: int):
        super().__init__()
        self.input_dim = self.output_dim = size

    def forward(self, u: Tensor) -> Tensor:
        return u


class Labels(nn.Module):
    """Class embeddings [B, class_dim], each one of `table` [K, class_dim], drawn at random."""

    table: Tensor

    def __init__(self, table: Tensor):
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, u: Tensor) -> Tensor:
        return self.table[torch.randint(len(self.table), (len(u),)).to(u.device)]


def bare(generator: nn.Module, labels: Sequence[int] = ()) -> Mined:
    """The generator without a miner, in the form of a result: its own z, and classes drawn from `labels`, or all.

    ValueError: labels that it does not have.
    """
    source = as_generator(generator)
    classes, class_miner = class_count(source), None
    if labels and not classes:
        raise ValueError(f"{type(source).__name__} has no classes: leave --class out")
    if labels and max(labels) >= classes:
        raise ValueError(f"class {max(labels)} is not there: the labels are 0 to {classes - 1}")
    if classes:
        table = class_embeddings(source)
        class_miner = Labels(table[list(labels)] if labels else table)
    return Mined(source, Same(source.latent_dim), class_miner).eval()


def is_bare(sampler: Network) -> bool:
    """Whether `bare` made it."""
    return isinstance(sampler, Mined) and isinstance(sampler.miner, Same)


def steer(sampler: Network, truncation: float = 1.0, noise: str | None = None) -> list[str]:
    """From now on the sampler's StyleGANs make images of truncated w, c + truncation (w - c), and with this noise.

    Of a BigGAN or BigGAN-deep without a miner z is truncated instead (arXiv 1809.11096, section 3.1), as its authors do
    in those they published: a normal variable that is cut off at ±2, times `truncation`, 0..1. That of a seed is the
    same quantile of this distribution as it was of the normal one, in the place of a new draw; at 1 it is left alone.

    c is the mean of the w that the images come from: behind a miner of the mined w, else of the network's own, as its
    file says, or over 10,000 draws of a fixed seed. noise: "random" | "constant" | "none"; None leaves it as it is.
    Returns lines that say which c it is.

    ValueError: the generator has nothing to truncate, or no noise; a noise or a truncation that is not there.
    """
    if noise is not None and noise not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
    if not math.isfinite(truncation):
        raise ValueError(f"truncation must be a number, got {truncation}")
    said: dict[str, None] = {}
    for branch in branches(sampler):
        generator, centre = branch.generator, None
        if truncation == 1 and noise is None:
            continue
        if isinstance(generator, ConditionalGenerator) and noise is None:
            _truncate_z(branch, truncation)
            said[f"z is drawn from a normal distribution cut off at 2, times {truncation:g}, as for BigGAN"] = None
            continue
        if not isinstance(generator, StyleBased):
            what = "noise" if truncation == 1 else "truncation"
            name = getattr(generator, "family", type(generator).__name__)
            raise ValueError(
                f"{what} is of StyleGAN and StyleGAN2, whose w and noise maps it acts on; {name} has none: leave it out"
            )
        if truncation != 1:
            centre, words = _centre(branch)
            said[words] = None
        generator.register_forward_pre_hook(partial(_steered, centre, truncation, noise), with_kwargs=True)
    return list(said)


def _truncate_z(branch: Mined, truncation: float) -> None:
    generator = branch.generator
    if not is_bare(branch):
        raise ValueError("the z of a BigGAN behind a miner is not truncated: the miner gives it; leave truncation out")
    if not 0 <= truncation <= 1:
        raise ValueError(f"a BigGAN's z is truncated by 0 to 1, got {truncation:g}")
    own = {"truncation": truncation} if isinstance(generator, BigGANDeepGenerator) else {}  # whose statistics follow it

    def cut(_, given: tuple, keywords: dict) -> tuple[tuple, dict]:
        z, *classes = given
        tail = torch.special.ndtr(torch.tensor(-2.0, dtype=torch.float64))
        p = tail + (1 - 2 * tail) * torch.special.ndtr(z.double())
        return (truncation * torch.special.ndtri(p).to(z), *classes), {**keywords, **own}

    generator.register_forward_pre_hook(cut, with_kwargs=True)


def _steered(centre: Tensor | None, truncation: float, noise: str | None, generator, given, keywords):
    """The arguments of a StyleGAN's call, with w in the place of z."""
    keywords = keywords if noise is None else {"noise": noise, **keywords}
    if centre is None:
        return given, keywords
    w = given[0] if keywords.get("latents") else generator.mapping(*given)
    return (centre + truncation * (w - centre),), {**keywords, "latents": True}


@torch.no_grad()
def _centre(branch: Mined) -> tuple[Tensor, str]:
    """(c [1, style_dim], what it is, in words)."""
    own = is_bare(branch)
    kept = getattr(branch.generator, "latent_avg", None)
    if own and isinstance(kept, Tensor):
        return kept.detach().reshape(1, -1), "truncated towards the mean of w that the file holds"
    like = next(branch.parameters())
    u = draw_inputs(CENTRE_SAMPLES, branch.input_dim, like, torch.Generator().manual_seed(0))
    with seeded(0, like.device):
        means = torch.stack([_styles(branch, part).double().mean(0) for part in u.split(1000)])
    whose = "of its own w" if own else "of the mined w"
    return means.mean(0, keepdim=True).to(like), f"truncated towards the mean {whose}, over {CENTRE_SAMPLES:,} draws"


def _styles(branch: Mined, u: Tensor) -> Tensor:
    """w [B, style_dim] of u."""
    latents = branch.latents(u)
    if branch.place == "w":
        return latents
    classes = [] if branch.class_miner is None else [branch.class_miner(u)]
    return cast(StyleBased, branch.generator).mapping(latents, *classes)


@torch.no_grad()
def of_seeds(sampler: Network, seeds: Sequence[int]) -> tuple[Tensor, list[int]]:
    """(images [N, C, R, R] in [-1, 1] on the CPU, who [N] made each): one of every seed, whatever the others are."""
    images, who = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        if isinstance(sampler, MultiGenerator):
            image, of = sampler.sample(1, generator=generator, return_who=True)
            who.append(int(of))
        else:
            image = sampler.sample(1, generator=generator)
            who.append(0)
        images.append(image.float().cpu().clamp(-1, 1))
    return torch.cat(images), who


def frames(
    branch: Mined, seeds: Sequence[int], between: int, space: str = "z", way: str | None = None, loop: bool = False
) -> Iterator[Tensor]:
    """Images [1, C, R, R] from the image of each seed to that of the next, `between` steps apart, at last back to the
    first where `loop`. At the seeds they are those of `of_seeds`, where the noise is not random.

    space: "z", in which the input of the miner moves; "w" of a StyleGAN, behind mapping and miner. way: "spherical" |
    "linear"; None: spherical in z, where N(0, I) lies on a sphere, linear in w.

    ValueError: fewer than two seeds, no w, several classes, a way or a space that is not there.
    """
    way = way or ("spherical" if space == "z" else "linear")
    for name, value, known in (("space", space, SPACES), ("way", way, WAYS)):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")
    if len(seeds) < 2:
        raise ValueError(f"between images there is something from two seeds on, got {len(seeds)}")
    if between < 1:
        raise ValueError(f"there must be at least 1 step from one seed to the next, got {between}")
    generator = branch.generator
    if space == "w" and not isinstance(generator, StyleBased):
        name = getattr(generator, "family", type(generator).__name__)
        raise ValueError(f"w is of StyleGAN and StyleGAN2; {name} has none: take z")
    if isinstance(branch.class_miner, Labels) and len(branch.class_miner.table) > 1:
        raise ValueError("between images of several classes each one would show a class at random: name one (--class)")
    return _moving(branch, seeds, between, space, way, loop)


def _moving(branch: Mined, seeds: Sequence[int], between: int, space: str, way: str, loop: bool) -> Iterator[Tensor]:
    with torch.no_grad():
        like = next(branch.parameters())
        drawn = [draw_inputs(1, branch.input_dim, like, torch.Generator().manual_seed(seed)) for seed in seeds]
        points = [u if space == "z" else _styles(branch, u) for u in drawn]
    constant = {} if branch.constant is None else {"constant": branch.constant}
    middle = spherical if way == "spherical" else torch.lerp

    @torch.no_grad()
    def image(point: Tensor) -> Tensor:
        made = branch(point) if space == "z" else branch.generator(point, latents=True, **constant)
        return made.float().cpu().clamp(-1, 1)

    for start, end in itertools.pairwise(points + points[:1] * loop):
        for step in range(between):
            yield image(middle(start, end, step / between))
    if not loop:
        yield image(points[-1])


def spherical(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """sin((1-t)θ)/sin θ · a + sin(tθ)/sin θ · b of a, b [B, D] with the angle θ between them (Shoemake 1985); where
    they point the same or opposite ways, the straight line."""
    a, b = start.double(), end.double()
    cosine = nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)[:, None]
    angle = cosine.acos()
    sine = angle.sin()
    straight = sine < 1e-6
    sine = sine.masked_fill(straight, 1.0)
    arc = (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / sine
    return torch.where(straight, torch.lerp(a, b, weight), arc).to(start)


def one_branch(sampler: Network, name: str | None) -> Mined:
    """The result of one source, or of several the one of that name. ValueError: it must be named, or is not there."""
    if not isinstance(sampler, MultiGenerator):
        if name is not None:
            raise ValueError("--of is for a run with several sources, and this one has one")
        return cast(Mined, sampler)
    if name not in sampler.names:
        got = "" if name is None else f", got {name!r}"
        raise ValueError(f"there are several sources: name one with --of, {' or '.join(sampler.names)}{got}")
    return branches(sampler)[sampler.names.index(name)]
