"""What all processes of a group do together: tensors in as few messages as there are dtypes and devices."""

from collections.abc import Callable

import torch
from torch import Tensor


def active(group) -> bool:
    """Whether the group, or the default one for None, has more than this process."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


@torch.no_grad()
def coalesced(tensors: list[Tensor], collective: Callable[[Tensor], object]):
    """Runs an in-place collective on all tensors, in one message per dtype and device. Collective."""
    buckets: dict[tuple, list[Tensor]] = {}
    for t in tensors:
        buckets.setdefault((t.dtype, t.device), []).append(t)
    for bucket in buckets.values():
        flat = torch.cat([t.flatten() for t in bucket])
        collective(flat)
        for t, new in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(new.view_as(t))


def average(tensors: list[Tensor], group):
    """Makes every tensor its mean over the process group. Collective."""

    def mean(flat):
        flat /= torch.distributed.get_world_size(group)  # first: the sum of half-precision gradients may overflow
        torch.distributed.all_reduce(flat, group=group)

    coalesced(tensors, mean)


def gradients(groups: list[dict]) -> list[Tensor]:
    """The gradients of all parameters that train; one that this rank's loss did not reach counts as zero."""
    parameters = [p for g in groups for p in g["params"]]
    for p in parameters:
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in parameters if p.grad is not None]


def average_gradients(groups: list[dict], group):
    """Averages all gradients over the process group, in one message per dtype and device. Collective."""
    if active(group):
        average(gradients(groups), group)
