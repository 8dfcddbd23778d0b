"""What a `MultiGenerator` does with the images, the scores and the draws of one branch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops._op import wide_dtype
from .draws import RowsOfBatch, set_random_state


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [B, C, H, W] of that height and width: bilinear, with a filter where it shrinks."""
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=min(size) < min(images.shape[2:]))


def rows_of(order: Tensor, counts: list[int]) -> Iterator[tuple[int, Tensor]]:
    """(i, the samples that are i's) for each i that has any."""
    return ((i, rows) for i, rows in enumerate(order.split(counts)) if len(rows))


def in_order(parts: list[Tensor], order: Tensor) -> Tensor:
    """The images of the parts, which follow `order`, as the samples do in the batch."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)[order.argsort()]


def scored(critic: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """[B] of at least float32; NaN for images that are not finite."""
    B, scores = len(images), critic(images)
    if scores.ndim < 1 or len(scores) != B:
        raise ValueError(f"the critic must give a score for each of {B} images, got shape {list(scores.shape)}")
    wide = wide_dtype(scores.dtype)
    sums = images.flatten(1).sum(1, dtype=wide_dtype(images.dtype))
    return scores.reshape(B, -1).mean(1, dtype=wide).masked_fill(~sums.isfinite(), torch.nan)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, one, other))


@contextmanager
def drawing_again(state: tuple[Tensor, ...] | None, rows: Tensor, batch: int) -> Iterator[Tensor]:
    """Gives the samples to run, which begin with `rows`; what is drawn for them is what they had in their batch, which
    began at `state`. Where nothing was drawn the state is None."""
    if state is None or len(rows) == batch:
        if state is not None:
            set_random_state(state, rows.device)
        yield rows
        return
    # A draw of one is more likely one for the whole batch than one for a single sample, so there are two of it.
    rows = rows if len(rows) > 1 else rows.repeat(2)
    set_random_state(state, rows.device)
    with RowsOfBatch(rows, len(rows), batch, leading=True):
        yield rows
