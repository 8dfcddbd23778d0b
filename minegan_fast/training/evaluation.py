"""How good a run is: metrics between generated and real images on features of the user's choice."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import metrics as m
from ..mining import MultiGenerator
from ..ops import mmd2
from .images import to_float
from .randomness import derived_seed

NAMED = (None, "critic", "pixels", "digits")


class CriticFeatures(nn.Module):
    """The penultimate activations of a source's critic: what the source knows of images, without a download.

    critic: a module with a method `features(x)`, which may take the size of its minibatch `group`.
    """

    def __init__(self, critic):
        super().__init__()
        self.critic = critic
        # Minibatch statistics of a group of one: no image's features depend on the rest of its batch.
        self.alone = {"group": 1} if "group" in inspect.signature(critic.features).parameters else {}

    def forward(self, x: Tensor) -> Tensor:
        return self.critic.features(x, **self.alone)


class PixelFeatures(nn.Module):
    """Images averaged down to 8x8 and flattened: for networks whose critic gives no features."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 8).flatten(1)


class Features:
    """images uint8 or float [N, C, R, R] -> features [N, D], in units of their RMS over the reference images.

    Without the scaling the polynomial kernel of KID gives values in the thousands on features that are not Inception's.
    """

    def __init__(self, module: nn.Module | m.FeatureExtractor, name: str, reference: Tensor | None = None):
        self.name = name
        if not isinstance(module, m.FeatureExtractor):
            size = 1 if reference is None else reference.shape[-1]
            module = m.FeatureExtractor(module, batch=at_once(size))
        self.extract = module
        self.scale = 1.0
        if reference is not None:
            self.scale = float(self(reference).square().mean().sqrt().clamp_min(1e-12))

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = to_float(images)
        return self.extract(images) / self.scale


def choose_features(choice, critic: nn.Module | None, reference: Tensor, device) -> Features:
    """Features for metrics.

    choice: None ("critic" where the source's critic has them, else "pixels"), "critic", "pixels", "digits" (the
    embedded classifier, 32x32 grey), a path of a TorchScript file or of Inception's weights, an nn.Module or a
    FeatureExtractor. The first two are scaled by their RMS over `reference`, uint8 [N >= 1, C, R, R].

    ValueError: no such features, or a network that does not take these images.
    """
    if choice is None:
        choice = "critic" if hasattr(critic, "features") else "pixels"
    if choice == "critic":
        if not hasattr(critic, "features"):
            raise ValueError('features="critic" needs a source critic with a features() method; use "pixels" or a path')
        return Features(CriticFeatures(critic).to(device), "critic", reference)
    if choice == "pixels":
        return Features(PixelFeatures().to(device), "pixels", reference)
    if choice == "digits":
        from ..data import classifier

        return Features(classifier().to(device), "digits")
    if isinstance(choice, (str, Path)):
        extractor = m.FeatureExtractor(choice, device=device, batch=at_once(reference.shape[-1]))
        features = Features(extractor, str(choice))
    else:
        features = Features(choice, type(choice).__name__)
    try:
        features(reference[:1])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the features {features.name} do not take images {list(reference.shape[1:])} ({reason}): give "
            "metrics.FeatureExtractor(network, resolution=...), or a network for these images"
        ) from error
    return features


def judge_name(features: Features, choice, loss_choice, critic_trained: bool) -> str:
    """The features' name, which says so where the network that judges also trained the run.

    choice: the setting `features`: a module, an extractor, a path, a name, or None. loss_choice: the setting
    `loss_features` in the same forms; None where no loss compares features. critic_trained: whether a critic trained
    that began as the source's.
    """

    def network(thing):
        return thing.module if isinstance(thing, m.FeatureExtractor) else thing

    judge = choice if choice is not None else features.name
    trained = network(judge) is network(loss_choice) or (isinstance(judge, str) and judge == loss_choice)
    trained |= critic_trained and features.name == "critic"
    return f"{features.name} (which trained it)" if trained else features.name


def at_once(resolution: int) -> int:
    """How many images are made or looked at at once, so that a snapshot takes no more memory than a step: 64, and of
    more than 128 pixels as many as have the pixels of these."""
    return max(1, min(64, 64 * 128**2 // resolution**2))


@torch.no_grad()
def generate(sampler, count: int, seed: int, batch: int | None = None) -> Tensor:
    """`count` images of `sampler.sample`, float [count, C, R, R] on the CPU. Seed and batch determine them.

    batch: how many at once; None: as `at_once` says.
    """
    return torch.cat(list(_generated(sampler.sample, count, seed, batch or at_once(_resolution(sampler)))))


def _resolution(sampler) -> int:
    """The largest one at which images are made, before they are brought to one size."""
    each: list = [*sampler.branches] if isinstance(sampler, MultiGenerator) else [sampler]
    return max(branch.generator.resolution for branch in each)


@torch.no_grad()
def generate_named(
    sampler: MultiGenerator, count: int, seed: int, batch: int | None = None
) -> tuple[Tensor, list[str]]:
    """The images of `generate`, and the name of the source of each."""
    who: list[int] = []

    def sample(size: int, generator: torch.Generator) -> Tensor:
        images, own = sampler.sample(size, generator=generator, return_who=True)
        who.extend(own.tolist())
        return images

    images = torch.cat(list(_generated(sample, count, seed, batch or at_once(_resolution(sampler)))))
    return images, [sampler.names[i] for i in who]


def _generated(sample: Callable[..., Tensor], count: int, seed: int, batch: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(derived_seed(seed, "generate"))
    for first in range(0, count, batch):
        yield sample(min(batch, count - first), generator=generator).float().cpu().clamp(-1, 1)


def _kid(fake: Tensor, real: Tensor) -> float:
    return m.kid(fake, real, subset_size=min(1000, len(fake), len(real)))[0]


# Diversity is in that of the real images.
MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "fid": m.fid,
    "kid": _kid,
    "kmmd": m.kmmd,
    "mv": lambda fake, real: m.mean_variance(fake),
    "diversity": lambda fake, real: m.diversity(fake) / max(m.diversity(real), 1e-12),
}


def measure(fake: Tensor, real: Tensor, names, notes: list[str] | None = None) -> dict[str, float]:
    """The named metrics of features fake [N, D] against real [M, D]. Their warnings go to `notes`, if it is given."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        values = {name: MEASURES[name](fake, real) for name in names}
    if notes is not None:
        notes += dict.fromkeys(str(warning.message) for warning in seen)
    return values


# FID has no interval: it rises where images are few. The jackknife takes KID over all rows instead of random subsets.
_JACKKNIFED: dict[str, Callable] = {**MEASURES, "kid": partial(mmd2, kernel="polynomial")}
del _JACKKNIFED["fid"]


def intervals(fake: Tensor, real: Tensor, values: dict[str, float], level: float = 0.95) -> dict[str, list[float]]:
    """[low, high] around the values of `measure` on the same features, by the jackknife; none where images are too few.

    N + M evaluations of each metric. The metrics' warnings are those of `measure`, and are not repeated.
    """
    found = {}
    for name, metric in _JACKKNIFED.items():
        if name not in values:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                low, high = m.bootstrap(metric, fake, real, level=level, method="jackknife")
            except ValueError:
                continue
        half = (high - low) / 2
        found[name] = [values[name] - half, values[name] + half]
    return found
