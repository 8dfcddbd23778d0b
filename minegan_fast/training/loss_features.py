"""Features of a frozen pretrained network, differentiable in the images: what a loss measures distances in.

Of each stage of the network (`stages.py`) with maps f [B, C, h, w] two groups of features, of two parts each:

    what      mean over the pixels                  [B, C]        sqrt(variance over them + e)     [B, C]
    where     means of p x p fields of the map      [B, C p^2]    and the deviations within them   [B, C p^2]

and of the images themselves their means of p x p fields, which see what a network does not look at: a pattern of single
pixels that its first layer's stride jumps over, or colours.

Each part is divided by its RMS over the target images, which makes groups of different layers and networks comparable.
Vectors [B, D] are a group of one part. Means and deviations of several layers as features that a generator is to match:
dos Santos et al. 2019, "Learning Implicit Generative Models by Matching Perceptual Features" (arXiv 1904.02762).
"""

import copy
import itertools
import os
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..metrics import FeatureExtractor
from .folding import fold_batch_norms
from .images import to_float
from .stages import Stages, evaluating

_EPSILON = 1e-8  # of a variance: the root has no gradient at 0
_CONSTANT = 1e-5  # of unit RMS
_LEAST = 1e-4  # of a map's variance: a smaller variance within a field is rounding
_SMALL = 96  # pixels: networks halve smaller images too early, see docs/quality.md


class LossFeatures:
    """images [B, C, R, R], floating point in [-1, 1] -> groups of features [B, D_g].

    Images are neither clamped nor rounded, and grey ones become three channels where the network takes three. Call
    `fit` first: it measures the scales.

    network: a module, a file that `metrics.FeatureExtractor` reads, or a FeatureExtractor, whose conversion of images
        is used, without its rounding. It is copied; the copy stays in eval mode, without gradients for its parameters.
    probe: images [at least 1, C, R, R] as the generator makes them, [-1, 1] or uint8. They serve to find the stages.
    taps, count: which stages, as `Stages` takes them.
    resolution, normalize: as FeatureExtractor takes them, for a module or a file. None enlarges smaller images to 96
        pixels, unless the network has an attribute `resolution`, or does not take images of that size.
    device: where the copy computes; None: where the module is, and on the CPU for a file.
    fields: p of the second group. On small maps it is less, at most two thirds of the map's width; where that is below
        2, and for fields=1, there is no such group. pixels: the p of the images' groups.
    bf16: run the network in bfloat16, by autocast. False: in its own dtype, whatever autocast is around the call.
    batch: how many images `fit` computes at once.

    Attributes: device, name (of the network), taps (the stages), names (of the groups), sizes (the D_g), scales (of the
    parts of each group).

    Raises ValueError, in one line, for images that the network does not take, features of an image that depend on the
    other images of its batch, as in train mode, NaN, and a network that is not differentiable.
    """

    def __init__(
        self,
        network: "nn.Module | str | os.PathLike | FeatureExtractor",
        probe: Tensor,
        taps: Sequence[str] | None = None,
        resolution: int | None = None,
        normalize: str | None = None,
        device=None,
        name: str | None = None,
        count: int = 5,
        fields: int = 4,
        pixels: Sequence[int] = (8, 32),
        bf16: bool = False,
        batch: int = 64,
    ):
        if fields < 1 or min(pixels, default=1) < 1 or batch < 1:
            raise ValueError(f"fields, pixels and batch must be at least 1, got {fields}, {pixels!r} and {batch}")
        self.fields, self.bf16, self.batch = fields, bf16, batch
        self.pixels = [p for p in pixels if p <= min(probe.shape[2:])]
        self._extractor = _own(network, resolution, normalize, device)
        self.device = self._extractor.anchor(torch.empty(0)).device
        module = self._extractor.module
        self.name = name or (os.fspath(network) if isinstance(network, (str, os.PathLike)) else type(module).__name__)
        self._shape, self._format, self.scales = tuple(probe.shape[1:]), torch.preserve_format, None
        self._extractor._check(probe)
        images = _floats(probe[:1]).to(self.device)
        self._fit_images(images, resolution is None and not isinstance(network, FeatureExtractor))
        self._stages = Stages(self._network(module), self._prepared(images), taps, count)
        self._speed_up(images)
        self.taps = self._stages.names
        self.names = list(self._parts(images))
        self.sizes = [sum(part.shape[1] for part in parts) for parts in self._check_gradient(images)]

    def maps(self, images: Tensor) -> list[Tensor]:
        """The stages' maps [B, C, h, w] or vectors [B, D] themselves, differentiable in the images."""
        sizes = (self._shape[1:], self._extractor.size)
        if (
            images.dim() != 4
            or images.shape[1] != self._shape[0]
            or tuple(images.shape[2:]) not in sizes
            or not images.is_floating_point()
        ):
            raise ValueError(
                f"expected floating point images [B, {', '.join(map(str, self._shape))}], as the target's are, got "
                f"{images.dtype} {list(images.shape)}"
            )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self._stages(self._prepared(images))

    def resized(self, images: Tensor) -> Tensor:
        """The images [B, C, R, R] at the size that the network takes, where that is known; still in [-1, 1]."""
        extractor = self._extractor
        if extractor.size is None or images.shape[2:] == torch.Size(extractor.size):
            return images
        shrinks = extractor.antialias and min(extractor.size) < min(images.shape[2:])
        return F.interpolate(images, extractor.size, mode=extractor.interpolation, antialias=shrinks)

    def fit(self, images: Tensor | Iterable[Tensor]) -> list[Tensor]:
        """Groups [M, D_g] of the target images [M, C, R, R]; from now on their parts have unit RMS.

        images: uint8 or floating point in [-1, 1], on any device; or several such tensors, which follow each other.

        Raises ValueError for images of another shape or range, for NaN, with the stage, and for a stage whose features
        are 0 or the same for all images.
        """
        found = {name: [] for name in self.names}
        with torch.no_grad():
            for tensor in [images] if isinstance(images, Tensor) else images:
                for part in tensor.split(self.batch):
                    self._extractor._check(part)
                    for name, parts in self._parts(_floats(part).to(self.device)).items():
                        found[name].append(parts)
            whole = [[torch.cat(batches) for batches in zip(*group, strict=True)] for group in found.values()]
            self.scales = [[float(part.double().square().mean().sqrt()) for part in parts] for parts in whole]
            for name, scales in zip(self.names, self.scales, strict=True):
                if not all(scales):
                    raise ValueError(f"the features {name!r} of {self.name} are 0 for all target images: choose taps=")
            groups = _joined(whole, self.scales)
        for name, group in zip(self.names, groups, strict=True):
            if len(group) > 1 and (group - group[0]).abs().max() <= _CONSTANT:
                raise ValueError(
                    f"the features {name!r} of {self.name} are the same for all {len(group)} target images: give "
                    f"different images, or other taps="
                )
        return groups

    def __call__(self, images: Tensor, validate: bool = True) -> list[Tensor]:
        """Groups [B, D_g], float32 (float64 of a float64 network). ValueError for NaN or inf, with the stage.

        validate: look for NaN and inf, which has to wait for a GPU.
        """
        if self.scales is None:
            raise ValueError("the scales of these features are not known yet: call fit(target images) first")
        return _joined(self._parts(images, validate).values(), self.scales)

    def _prepared(self, images: Tensor) -> Tensor:
        """What the network takes, on its device."""
        anchor = self._extractor.anchor(images)
        images = images.to(anchor.device, torch.float64 if anchor.dtype == torch.float64 else torch.float32)
        images = self._extractor.prepare(self.resized(images), as_saved=False)
        return images if self._format == torch.preserve_format else images.contiguous(memory_format=self._format)

    def _network(self, module: nn.Module) -> nn.Module:
        return _Asked(module) if self._extractor.variant == "nvidia" else module

    def _parts(self, images: Tensor, validate: bool = True) -> dict[str, list[Tensor]]:
        """The parts of each group, before they are scaled."""
        maps = [m if m.dtype == torch.float64 else m.float() for m in self.maps(images)]
        groups: dict[str, list[Tensor]] = {}
        with torch.autocast(self.device.type, enabled=False):
            for p in self.pixels:
                groups[f"pixels {p}x{p}"] = [F.adaptive_avg_pool2d(images.to(maps[0]), p).flatten(1)]
            for name, m in zip(self.taps, maps, strict=True):
                groups |= self._parts_of(name, m)
        if not validate:
            return groups
        sums = torch.stack([torch.stack([part.detach().sum() for part in parts]).sum() for parts in groups.values()])
        if not sums.isfinite().all():  # the one transfer from the device, for all groups
            bad = list(groups)[int((~sums.isfinite()).nonzero()[0])]
            what = "the images hold NaN or inf" if not images.isfinite().all() else "the images do not"
            raise ValueError(f"the features {bad!r} of {self.name} hold NaN or inf ({what})")
        return groups

    def _parts_of(self, name: str, m: Tensor) -> dict[str, list[Tensor]]:
        if m.dim() == 2:
            return {name: [m]}
        size = min(m.shape[2:])
        pixels = m.permute(0, 2, 3, 1).flatten(1, 2)  # torch.var_mean takes 40 times as long on maps of 2 x 2
        mean = pixels.mean(1)
        groups = {name: [mean]}
        if m.shape[2:].numel() == 1:
            return groups
        variance = (pixels - mean[:, None]).square().mean(1)
        groups[name].append((variance + _EPSILON).sqrt())
        p = min(self.fields, 2 * size // 3)
        if p > 1:
            # Centred on the map's mean first: squares far from 0 leave no digits of a small variance.
            centre, least = (t.detach()[:, :, None, None] for t in (mean, _LEAST * variance))
            means, squares = (F.adaptive_avg_pool2d(x, p) for x in (m, (m - centre).square()))
            variances = torch.maximum(squares - (means - centre).square(), least)  # the root of mere rounding is steep
            groups[f"{name} {p}x{p}"] = [means.flatten(1), (variances + _EPSILON).sqrt().flatten(1)]
        return groups

    def _fit_images(self, image: Tensor, any_size: bool) -> None:
        """Repeats grey images if the network takes no others, and enlarges small ones if it takes them enlarged."""
        extractor, module = self._extractor, self._network(self._extractor.module)
        channels = [extractor.channels] + [3] * (extractor.channels is None and image.shape[1] == 1)
        sizes = [extractor.size]
        any_size &= extractor.size is None and extractor.variant is None and not hasattr(module, "resolution")
        if any_size and min(image.shape[2:]) < _SMALL:
            sizes.insert(0, (_SMALL, _SMALL))
        failure: Exception | None = None
        for extractor.size, extractor.channels in itertools.product(sizes, channels):
            try:
                with torch.no_grad(), evaluating(module):
                    module(self._prepared(image))
                return
            except Exception as error:
                failure = error
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        message = next((line for line in lines if "Error" in line), lines[0])
        raise ValueError(
            f"{self.name} does not take images {list(image.shape[1:])}, resized to {extractor.size or 'no other size'} "
            f"({message.strip()}): give metrics.FeatureExtractor(network, resolution=...), or a network for these "
            "images"
        ) from failure

    def _speed_up(self, image: Tensor) -> None:
        """Folds batch norms into the convolutions before them and, on a CPU, takes channels last: twice as fast.

        Where that changes the features, as in a network that reads its batch norms by itself, all stays as it was.
        """
        plain, x = self._stages.network, torch.cat([image, -image.flip(3)])
        if isinstance(self._extractor.module, torch.jit.ScriptModule):
            return
        with torch.no_grad():
            before = self.maps(x)
            fast = fold_batch_norms(plain, self._prepared(x)) or copy.deepcopy(plain)
            if self.device.type == "cpu":
                # The call is documented; the annotations of torch lack it.
                fast.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
                self._format = torch.channels_last
            self._stages.network = fast
            try:
                # Room for rounding, also in half precision; a wrong fold is off by the size of the features.
                same = all((a - b).norm() <= 1e-2 * b.norm() for a, b in zip(self.maps(x), before, strict=True))
            except Exception:
                same = False
        if same:
            self._extractor.module = fast
        else:
            self._stages.network, self._format = plain, torch.preserve_format

    def _check_gradient(self, images: Tensor) -> list[list[Tensor]]:
        images = images.clone().requires_grad_()
        with torch.enable_grad():
            stages = self._parts(images)
        for name, parts in stages.items():
            slopes = None
            if all(part.requires_grad for part in parts):
                (slopes,) = torch.autograd.grad([part.sum() for part in parts], images, retain_graph=True)
            if slopes is None or not slopes.any():
                raise ValueError(
                    f"{self.name} is not differentiable: its features {name!r} pass no gradient to the images; a loss "
                    f"needs a network that neither rounds nor detaches them"
                )
        return list(stages.values())


def _joined(groups: Iterable[list[Tensor]], scales: list[list[float]]) -> list[Tensor]:
    """The parts of each group, at unit RMS, side by side."""
    pairs = zip(groups, scales, strict=True)
    return [torch.cat([part / s for part, s in zip(parts, own, strict=True)], 1) for parts, own in pairs]


def _floats(images: Tensor) -> Tensor:
    return to_float(images) if images.dtype == torch.uint8 else images


class _Asked(nn.Module):
    """A TorchScript network of StyleGAN2-ADA's metrics, asked for features."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, return_features=True)


def _own(network, resolution, normalize, device) -> FeatureExtractor:
    """An extractor with a frozen copy of the network."""
    if isinstance(network, FeatureExtractor):
        if resolution is not None or normalize is not None:
            raise ValueError("a FeatureExtractor has its own resolution and normalize: set them there")
        extractor = copy.copy(network)
    elif isinstance(network, nn.Module):
        extractor = FeatureExtractor(network, resolution=resolution, normalize=normalize)
    else:
        extractor = FeatureExtractor(network, resolution=resolution, normalize=normalize, device=device)
    try:
        with torch.no_grad():  # a script's tensors would be results of the others
            module = copy.deepcopy(extractor.module)
    except RuntimeError as error:
        raise ValueError(f"{type(network).__name__} cannot be copied ({error}): give a copy of its own") from None
    for parameter in module.parameters():  # a script has no requires_grad_()
        parameter.requires_grad_(False)
    extractor.module = module.eval()
    if device is not None:
        module.to(device)
    return extractor
