"""Differentiable augmentation of what the critic sees, real and generated alike.

Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training". A policy is a list of words, applied in
its order; each may carry a strength s after a colon, in (0, 1]:

    color:s          brightness x + s·U(-½, ½); saturation around the pixel's grey, factor 1 + s·U(-1, 1);
                     contrast around the image's mean, factor 1 + s·U(-½, ½); default s = 1
    translation:s    shift by whole pixels, up to s of each side, zeros move in; default s = 1/8
    cutout:s         a rectangle of s of each side is zeroed, its centre anywhere in the image; default s = 1/2
    flip:s           mirrored left to right with probability s; default s = 1/2
    jitter:s         zoom by 1 + s·U(-1, 1), shift by s·U(-1, 1) of each side, between pixels, the border repeated;
                     default s = 1/20
"""

from functools import lru_cache

import torch
from torch import Tensor


def diff_augment(
    x: Tensor, policy: str = "color,translation,cutout", generator: torch.Generator | None = None
) -> Tensor:
    """x [B, C, H, W], floating point, any C -> the same shape and dtype; every sample has its own random numbers.

    Differentiable any number of times in x. The random numbers come from `generator`, on its device (a CPU generator
    serves CUDA tensors and gives the same numbers), or from the default one of x's device; they are drawn in float32
    whatever x is. policy "" is the identity. ValueError: unknown word or strength, wrong shape or dtype.
    """
    words = parse_policy(policy)
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"images must be floating point [B, C, H, W], got {x.dtype} {list(x.shape)}")
    draws = sum(_WORDS[word][1] for word, _ in words)
    if draws == 0:
        return x
    random = torch.rand(draws, len(x), generator=generator, device=generator.device if generator else x.device)
    random = random.to(x.device)  # one transfer for the whole policy
    for word, strength in words:
        function, count, _ = _WORDS[word]
        x = function(x, random[:count], strength)
        random = random[count:]
    return x


@lru_cache
def parse_policy(policy: str) -> tuple[tuple[str, float], ...]:
    """Splits "color,flip:0.1" into (("color", 1.0), ("flip", 0.1)). ValueError: unknown word, bad strength."""
    words = []
    for part in filter(None, (part.strip() for part in policy.split(","))):
        word, colon, strength = part.partition(":")
        if word not in _WORDS:
            raise ValueError(f"unknown augmentation {word!r} in {policy!r}: choose from {', '.join(_WORDS)}")
        try:
            value = float(strength) if colon else _WORDS[word][2]
        except ValueError:
            value = float("nan")
        if not 0 < value <= 1:
            raise ValueError(f"the strength of {word!r} must be above 0 and at most 1, got {strength!r} in {policy!r}")
        words.append((word, value))
    return tuple(words)


def _color(x: Tensor, random: Tensor, strength: float) -> Tensor:
    brightness, saturation, contrast = (strength * (random - 0.5)).to(x.dtype)[:, :, None, None, None]
    x = x + brightness
    if x.shape[1] > 1:
        grey = x.mean(dim=1, keepdim=True)
        x = grey + (x - grey) * (1 + 2 * saturation)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * (1 + contrast)


def _translation(x: Tensor, random: Tensor, strength: float) -> Tensor:
    reach = [round(strength * size) for size in x.shape[2:]]
    down, right = ((r * (2 * most + 1)).floor().long() - most for r, most in zip(random, reach, strict=True))
    return _Shift.apply(x, down, right)


class _Shift(torch.autograd.Function):
    """Sample b moves down[b] rows and right[b] columns, zeros move in. The adjoint is the shift back, so no
    backward needs a scatter."""

    @staticmethod
    def forward(ctx, x, down, right):
        ctx.save_for_backward(down, right)
        height, width = x.shape[2:]
        rows = torch.arange(height, device=x.device) - down[:, None]
        columns = torch.arange(width, device=x.device) - right[:, None]
        inside = _outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
        index = (rows.clamp(0, height - 1) * width)[:, :, None] + columns.clamp(0, width - 1)[:, None, :]
        index = index.flatten(1)[:, None, :].expand(-1, x.shape[1], -1)
        return x.flatten(2).gather(2, index).view(x.shape).masked_fill_(~inside, 0)

    @staticmethod
    def backward(ctx, *gradients):
        (gradient,), (down, right) = gradients, ctx.saved_tensors
        return _Shift.apply(gradient, -down, -right), None, None


def _cutout(x: Tensor, random: Tensor, strength: float) -> Tensor:
    hidden = []
    for r, size in zip(random, x.shape[2:], strict=True):
        side = round(strength * size)
        first = (r * (size + 1 - side % 2)).floor().long() - side // 2
        position = torch.arange(size, device=x.device) - first[:, None]
        hidden.append((position >= 0) & (position < side))
    return x.masked_fill(_outer(*hidden), 0)


def _flip(x: Tensor, random: Tensor, strength: float) -> Tensor:
    return torch.where(random[0][:, None, None, None] < strength, x.flip(3), x)


def _jitter(x: Tensor, random: Tensor, strength: float) -> Tensor:
    """Zoom and shift are separable: columns and rows are resampled linearly, each by one matrix a sample, which serves
    all channels in one product."""
    B, C, H, W = x.shape
    zoom, down, right = strength * (2 * random - 1)
    x = x.reshape(B, C * H, W) @ _resampling(W, zoom, right).to(x.dtype).transpose(1, 2)
    x = x.view(B, C, H, W).transpose(1, 2).reshape(B, H, C * W)
    return (_resampling(H, zoom, down).to(x.dtype) @ x).view(B, H, C, W).transpose(1, 2)


def _resampling(size: int, zoom: Tensor, shift: Tensor) -> Tensor:
    """[B, size, size]: row i holds the weights of the pixels beside the place that pixel i comes from."""
    pixels = torch.arange(size, device=zoom.device)
    middle = (size - 1) / 2
    place = ((pixels - middle) * (1 + zoom)[:, None] + shift[:, None] * size + middle).clamp(0, size - 1)
    return (1 - (pixels - place[:, :, None]).abs()).clamp(min=0)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    """[B, H] and [B, W] -> mask [B, 1, H, W]."""
    return rows[:, None, :, None] & columns[:, None, None, :]


# word: (function, random numbers a sample, default strength)
_WORDS = {
    "color": (_color, 3, 1.0),
    "translation": (_translation, 2, 0.125),
    "cutout": (_cutout, 2, 0.5),
    "flip": (_flip, 1, 0.5),
    "jitter": (_jitter, 3, 0.05),
}
