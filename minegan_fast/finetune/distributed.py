"""Several processes: the same neurons on every rank, and DDP told of parameters that it did not know."""

import operator
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .link import Link


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DDP and torch.compile's wrapper: names are those of the model itself."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def active(group) -> bool:
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def agree(scores: dict[str, Tensor], group) -> dict[str, Tensor]:
    """The first rank's scores on every rank: a difference in the last bit would select other neurons. Collective."""
    if not active(group):
        return scores
    box = [scores]
    torch.distributed.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def check_equal(selection, group):
    """RuntimeError on every rank where the ranks select by hand and differ. Collective."""
    if active(group):
        mine = {name: rows.tolist() for name, rows in selection.rows.items()}
        everyone = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(everyone, mine, group=group)
        if any(other != mine for other in everyone):
            raise RuntimeError("the ranks were given different selections; give every rank the same")


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


# DDP wrappers that reduce leaves: {wrapper: (Link.epoch then, the parameters that it reduces)}.
_told: "weakref.WeakKeyDictionary[DistributedDataParallel, tuple[int, list[nn.Parameter]]]"
_told = weakref.WeakKeyDictionary()


def changed(model: nn.Module):
    """Where weights of `model` are held or plain again, every DDP around it that reduces leaves looks anew."""
    Link.epoch += 1
    ours = set(model.modules()) if _told else ()
    for ddp in list(_told):
        if not set(ddp.module.modules()).isdisjoint(ours):
            tell(ddp)


def tell(ddp: DistributedDataParallel):
    """Lets DDP reduce the leaves of held weights in place of the weights, which bring it no gradient.

    DDP fixes at construction which gradients it reduces. A wrapper may be anywhere above a model, which has no way up
    to it, and may be made before the selection or after: so a held weight that is used in a wrapper's forward tells it.
    A weight with hooks gets a gradient of its own, and is reduced itself.
    """
    epoch, known = _told.get(ddp, (None, []))
    if epoch == Link.epoch:
        return
    listed = []
    for name, parameter in ddp.module.named_parameters():
        link = parameter.link if getattr(type(parameter), "held", False) else None
        trains = parameter if link is None or link.leaf is None or link.hooked else link.leaf
        if trains.requires_grad and name not in ddp.parameters_to_ignore:
            listed.append((name, trains))
    parameters = [p for _, p in listed]
    _told[ddp] = Link.epoch, parameters
    if parameters and not (len(known) == len(parameters) and all(map(operator.is_, known, parameters))):
        _reduce(ddp, listed)


def _reduce(ddp: DistributedDataParallel, listed: list[tuple[str, nn.Parameter]]):
    """Gives DDP a new reducer, of these parameters."""
    ddp._module_parameters = [p for _, p in listed]
    names = {i: name for i, (name, _) in enumerate(listed)}
    sparse = {p for m in ddp.module.modules() if getattr(m, "sparse", False) for p in m.parameters(recurse=False)}
    ddp._ddp_init_helper(ddp._module_parameters, [p in sparse for _, p in listed], names, ddp.static_graph)
    for hook, state in ddp._comm_hooks:
        torch.distributed._register_comm_hook(ddp.reducer, state, hook)
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
    if torch.is_grad_enabled() and ddp.require_backward_grad_sync:
        ddp.reducer.prepare_for_forward()


def check_gradients(groups: list[dict], group):
    """RuntimeError on every rank where the ranks' gradients differ. Collective."""
    if not active(group):
        return
    own = [0.0 if p.grad is None else float(p.grad.norm()) for g in groups for p in g["params"]]
    everyone = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyone, own, group=group)
    first = torch.tensor(everyone[0], dtype=torch.float64)
    for rank, other in enumerate(everyone):
        same = torch.isclose(torch.tensor(other, dtype=torch.float64), first, rtol=1e-4, equal_nan=True)
        if not same.all():
            raise RuntimeError(
                f"the gradients of ranks 0 and {rank} differ at the first step after a selection, so their networks "
                "would drift apart: wrap the model in DistributedDataParallel, or give SparseFinetuner process_group="
            )
