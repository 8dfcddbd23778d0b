"""Several processes: the same neurons on every rank, and DDP told of parameters that it did not know."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


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


def rebuild_reducers(model: nn.Module):
    """Lets every DDP around or inside `model` list its parameters anew.

    DDP fixes at construction which gradients it reduces. After a selection it would wait for dense gradients that
    never come, and leave the compact ones different on every rank. The wrapper may be anywhere above the model, which
    has no way up to it, so the living objects are searched.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    ours = set(model.modules())
    # not isinstance: DDP is an abstract base class, whose check is slow on hundreds of thousands of objects
    for ddp in [o for o in gc.get_objects() if DistributedDataParallel in type(o).__mro__]:
        if ours.isdisjoint(ddp.module.modules()):
            continue
        ignored = ddp.parameters_to_ignore
        listed = nn.Module.named_parameters(ddp.module)  # with the leaves
        ddp._module_parameters = [p for name, p in listed if name not in ignored]
        parameters, sparse = ddp._build_params_for_reducer()
        if parameters:
            names = ddp._build_debug_param_to_name_mapping(parameters)
            ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
            for hook, state in ddp._comm_hooks:
                torch.distributed._register_comm_hook(ddp.reducer, state, hook)
            if ddp.static_graph:
                ddp.reducer._set_static_graph()
