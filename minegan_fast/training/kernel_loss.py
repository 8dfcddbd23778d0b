"""The kernel distance between features of generated images and of the target, as the loss of a generator.

    loss = sum over the groups g of mmd2(f_g(generated), f_g(target))

without a critic (Gretton et al. 2012, "A Kernel Two-Sample Test"; generators trained by it: Li et al. 2015, "Generative
Moment Matching Networks"; with features of a pretrained network: dos Santos et al. 2019, arXiv 1904.02762). A group is
a stage of the network; its gaussian kernels have the median distance within the target, times `scales`, as bandwidths,
and one more where the source is out of their reach.

A batch that is too large for the memory is made in parts (gradient caching: Gao et al. 2021, arXiv 2101.06983): the
distance needs the features of all samples, but its gradient by them is all that a part needs to go on alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from ..mining.draws import random_state, set_random_state
from ..ops._features import median_distance
from ..ops.mmd_groups import MmdTarget, mmd_groups
from .augment import diff_augment, parse_policy
from .images import to_float
from .loss_features import LossFeatures
from .processes import Processes
from .randomness import keep_and_set_random_state

# Features of this process's samples -> those of all processes, and where its own are among them.
Gather = Callable[[list[Tensor]], tuple[list[Tensor], slice]]

# Measured on nine sets of 10 to 100 images. Sets whose mirror images a person takes for the same kind (avatars, eyes)
# are below 0.01; sets with a direction (digits, heads that all look the same way) are above 0.055.
MIRRORED = 0.03
MOST = 256  # images that `mirrored` looks at
# So many bandwidths away a gaussian kernel is 0.011 and pulls at nothing: a generator whose images lie there would only
# learn to make them unlike each other. Faces and avatars are 1.3 to 2.8 apart, digits and their negatives 1.8 to 6.8.
REACH = 3.0


class KernelLoss:
    """generated images [B, C, R, R] in [-1, 1] -> their kernel distance to the target, 0-d.

    features: fitted here to the target.
    images: the target, uint8 [N >= 2, C, R, R].
    flips: whether the target also holds the mirror image of each image; None: if `mirrored` finds that they look alike.
    augment: the policy by which `diff_augment` changes all images at random, the generated ones and the target's, after
        they were brought to the network's size: so like is compared with like.
    views: how many versions of each target image (and mirror image), each changed at random, the target holds.
    scales: the bandwidths of a group, in units of its median distance.
    unbiased: whether the estimator leaves out the pairs of a sample and itself, for which it needs 2 generated images.
        With it, images that come close to each other cost, whatever the batch.
    seed: determines the target's views.
    source: batches of images [N, C, R, R] in [-1, 1] that the generator makes before it learns. Where they are further
        from the target than a group's kernels reach, the group gets one more kernel, with the median of these distances
        as its bandwidth. They are drawn from the random state that `seed` determines.

    Attributes: flips, names (of the groups), bandwidths, target (the features of all of it, on the network's device).

    Raises ValueError for fewer than 2 images, images of which half have the same features, and what LossFeatures.fit
    refuses.
    """

    def __init__(
        self,
        features: LossFeatures,
        images: Tensor,
        flips: bool | None = None,
        views: int = 1,
        augment: str = "",
        scales: Sequence[float] = (0.25, 0.5, 1.0),
        unbiased: bool = True,
        batch: int = 64,
        seed: int = 0,
        source: Iterable[Tensor] = (),
    ):
        if images.dim() != 4 or images.dtype != torch.uint8:
            raise ValueError(f"target images must be uint8 [N, C, R, R], got {images.dtype} {list(images.shape)}")
        if len(images) < 2:
            raise ValueError(f"a kernel distance needs at least 2 target images, got {len(images)}")
        if views < 1 or (views > 1 and not parse_policy(augment)):
            raise ValueError(f"views is at least 1, and more need augment, got views={views} and augment={augment!r}")
        if not scales or min(scales) <= 0 or batch < 1:
            raise ValueError(f"scales must be > 0 and batch at least 1, got {tuple(scales)} and {batch}")
        if bool((images == images[:1]).all()):
            raise ValueError(f"all {len(images)} target images are equal: give different images")
        self.shape = images.shape[1:]
        self.features, self.names, self.augment, self.unbiased = features, features.names, augment, unbiased
        self.flips = mirrored(features, images) if flips is None else flips
        with keep_and_set_random_state(seed, "views of the target"):
            groups = features.fit(self._views(images, self.flips, views, batch))
            with torch.no_grad():
                begun = [self._features(batch) for batch in source]
        self.bandwidths = []
        for g, (name, group) in enumerate(zip(self.names, groups, strict=True)):
            median = _median(features, name, group)
            self.bandwidths.append([scale * median for scale in scales])
            if begun:
                distance = float(torch.cdist(torch.cat([batch[g] for batch in begun]), group).median())
                if distance > REACH * max(scales) * median:
                    self.bandwidths[-1].append(distance)
        self.target = MmdTarget(groups, self.bandwidths, unbiased=unbiased)
        self._repeats = False

    def __call__(self, images: Tensor) -> Tensor:
        return self.distances(images).sum()

    def distances(self, images: Tensor) -> Tensor:
        """mmd2 of every group, [G], differentiable in the images."""
        return self._distances(self._features(images))

    def backward(
        self,
        make: Callable[[int, int], Tensor],
        count: int,
        part: int | None = None,
        scale: "float | Tensor" = 1.0,
        gather: Gather | None = None,
        processes: int = 1,
        validate: bool = True,
    ) -> Tensor:
        """The loss of `count` samples, detached; its gradient, times `scale`, is added to all that `make` depends on.

        make: (first, last) -> images [last - first, C, R, R] of the samples first to last - 1, with their graph. Where
            there are several parts, each is made twice, first without a graph; the random state of the CPU and of the
            features' device is put back for the second time. Samples may not depend on each other (batch norm in train
            mode), and nothing that a forward changes may change the next one (spectral norm in train mode).
        part: how many samples are in memory at once; None: all.
        gather, processes: for several processes, each with `count` samples of its own: see `gathering`. The loss is
            that of all samples, and its gradient is the mean of the processes' gradients.
        validate: as in `LossFeatures`.

        The gradient is that of all samples at once, to rounding. ValueError: fewer than 2 samples where the distance is
        unbiased; `make` gave other images the second time.
        """
        parts, states = cut(count, part), []
        if len(parts) == 1:
            own = self._features(make(*parts[0]), validate)
        else:
            own, states = self.made(make, parts, validate)
        everyone, rows = gather([group.detach() for group in own]) if gather else (own, slice(0, count))
        leaves = [group.detach().requires_grad_() for group in everyone]
        with torch.enable_grad():
            loss = self._distances(leaves).sum()
            slopes = torch.autograd.grad(loss, leaves)
        # A process adds the gradient by its own samples, and the trainer takes the mean over the processes.
        slopes = [slope[rows] * (scale * processes) for slope in slopes]
        if len(parts) == 1:
            torch.autograd.backward(own, slopes)
            return loss.detach()
        self.again(make, parts, states, own, slopes, validate, check=not self._repeats)
        self._repeats = True
        return loss.detach()

    @torch.no_grad()
    def made(
        self, make: Callable[[int, int], Tensor], parts: list[tuple[int, int]], validate: bool = True
    ) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        """The features of all parts, from which the slopes of each follow, and the random state that each began at."""
        found, states = [], []
        for first, last in parts:
            states.append(random_state(self.features.device))
            found.append(self._features(make(first, last), validate))
        return [torch.cat(group) for group in zip(*found, strict=True)], states

    @torch.no_grad()
    def skip(self, parts: list[tuple[int, int]]) -> None:
        """Draws what `made` draws for the parts, which another process makes."""
        for first, last in parts:
            self._augmented(torch.zeros(last - first, *self.shape, device=self.features.device))

    def again(
        self,
        make: Callable[[int, int], Tensor],
        parts: list[tuple[int, int]],
        states: list[tuple[Tensor, ...]],
        own: list[Tensor],
        slopes: list[Tensor],
        validate: bool = True,
        check: bool = True,
    ) -> None:
        """Makes the parts once more, with a graph, and gives them the slopes of their features.

        check: whether the features are those that were `made`; ValueError where not.
        """
        for (first, last), state in zip(parts, states, strict=True):
            set_random_state(state, self.features.device)
            features = self._features(make(first, last), validate)
            if check:
                self._check_repeats(features, [group[first:last] for group in own])
            torch.autograd.backward(features, [slope[first:last] for slope in slopes])

    def _features(self, images: Tensor, validate: bool = True) -> list[Tensor]:
        return self.features(self._augmented(images), validate)

    def _augmented(self, images: Tensor) -> Tensor:
        return diff_augment(self.features.resized(images), self.augment) if self.augment else images

    def _views(self, images: Tensor, flips: bool, views: int, batch: int) -> Iterator[Tensor]:
        """Tensors of at most `batch` images: all of them, and their mirror images, as often as there are views."""
        for version in [images, images.flip(3)] if flips else [images]:
            for part in version.split(batch):
                for _ in range(views):
                    yield self._augmented(to_float(part)) if self.augment else part

    def _distances(self, groups: list[Tensor]) -> Tensor:
        if self.unbiased and len(groups[0]) < 2:
            raise ValueError("the unbiased kernel distance needs a batch of at least 2: set batch=2 or more")
        return mmd_groups(groups, self.target, validate=False)  # the features have been checked

    def _check_repeats(self, again: list[Tensor], before: list[Tensor]) -> None:
        for a, b in zip(again, before, strict=True):
            if (a.detach() - b).norm() > 1e-2 * b.norm():
                raise ValueError(
                    "the second time other images were made for the same samples: a batch in parts needs a generator "
                    "in eval mode, and latents that are drawn once"
                )


def cut(count: int, part: int | None) -> list[tuple[int, int]]:
    """The first and the last of each part of `count` samples. ValueError: parts of none."""
    if part is not None and part < 1:
        raise ValueError(f"part must be at least 1 sample, or None for all, got {part}")
    return [(i, min(i + (part or count), count)) for i in range(0, count, part or count)]


@torch.no_grad()
def mirrored(features: LossFeatures, images: Tensor) -> bool:
    """Whether images [N >= 2, C, R, R] and their mirror images are so alike that a GAN of both is one of either: faces
    are, letters are not.

    They are if their squared kernel distance is below the fraction `MIRRORED` of the difference between two images of
    the same set. No pair of an image and its own mirror image counts, so the estimate is unbiased for any N. The first
    256 images count. Fits `features` to the images.
    """
    images = to_float(images[:MOST])
    distance = spread = 0.0
    for name, straight, mirror in zip(features.names, features.fit(images), features(images.flip(3)), strict=True):
        both, n = torch.cat([straight, mirror]).double(), len(straight)
        kernel = torch.exp(-0.5 * (torch.cdist(both, both) / _median(features, name, straight)).square())
        same, other, across = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
        same, other, across = ((k.sum() - k.diagonal().sum()) / (n * (n - 1)) for k in (same, other, across))
        distance += float(same + other - 2 * across)
        spread += float(1 - same)
    return distance < MIRRORED * spread


def _median(features: LossFeatures, name: str, group: Tensor) -> float:
    remedy = f"in the features {name!r} of {features.name}: give images that differ, or other taps="
    return median_distance(group, remedy=remedy)


def gathering(processes: Processes, batch: int) -> Gather | None:
    """For `KernelLoss.backward`: collects the features of all processes' parts of a batch, those of process 0 first.

    None where this process is alone.
    """
    if processes.size == 1:
        return None
    counts = [len(range(rank, batch, processes.size)) for rank in range(processes.size)]
    first = sum(counts[: processes.rank])
    rows = slice(first, first + counts[processes.rank])

    def gather(groups: list[Tensor]) -> tuple[list[Tensor], slice]:
        own = torch.cat(groups, 1)
        padded = own.new_zeros(max(counts), own.shape[1])
        padded[: len(own)] = own
        everyone = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(everyone, padded)
        whole = torch.cat([samples[:count] for samples, count in zip(everyone, counts, strict=True)])
        return list(whole.split([group.shape[1] for group in groups], 1)), rows

    return gather
