"""What all processes of a group do together. Tensors travel in one message for each dtype and device."""

import pickle
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Group: TypeAlias = "torch.distributed.ProcessGroup | None"  # None is the default group


def active(group: Group) -> bool:
    """Whether the group, or the default one for None, has more than this process."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


@torch.no_grad()
def coalesced(tensors: list[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Runs an in-place collective on all tensors. Every process of the group has to call it."""
    buckets: dict[tuple, list[Tensor]] = {}
    for t in tensors:
        buckets.setdefault((t.dtype, t.device), []).append(t)
    for bucket in buckets.values():
        flat = torch.cat([t.flatten() for t in bucket])
        collective(flat)
        for t, new in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(new.view_as(t))


def average(tensors: list[Tensor], group: Group) -> None:
    """Replaces every tensor by its mean over the group. Every process of the group has to call it."""

    def mean(flat):
        flat /= torch.distributed.get_world_size(group)  # before the sum, which may overflow in half precision
        torch.distributed.all_reduce(flat, group=group)

    coalesced(tensors, mean)


def gradients(groups: list[dict]) -> list[Tensor]:
    """The gradients of all parameters that train. A parameter that this rank's loss did not reach gets zeros."""
    parameters = [p for g in groups for p in g["params"]]
    for p in parameters:
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in parameters if p.grad is not None]


def average_gradients(groups: list[dict], group: Group) -> None:
    """Averages the gradients of all parameters over the group. Every process of the group has to call it."""
    if active(group):
        average(gradients(groups), group)


def portable(error: Exception) -> Exception:
    """The error in a form that can be sent: itself, or where it cannot be pickled a RuntimeError that names it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
