"""Several processes: the same neurons on every rank, and DDP told of parameters that it did not know."""

import gc

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
def average_gradients(groups: list[dict], group):
    """Averages all gradients over the process group, in one message per dtype and device. A rank without a gradient
    counts as zero. Collective."""
    if not active(group):
        return
    buckets: dict[tuple, list[Tensor]] = {}
    for p in (p for g in groups for p in g["params"]):
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
        if p.grad is not None:
            buckets.setdefault((p.grad.dtype, p.grad.device), []).append(p.grad)
    for grads in buckets.values():
        flat = torch.cat([g.flatten() for g in grads])
        torch.distributed.all_reduce(flat, group=group)
        flat /= torch.distributed.get_world_size(group)
        for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(mean.view_as(g))


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
        ddp._module_parameters = [p for name, p in ddp.module.named_parameters() if name not in ignored]
        parameters, sparse = ddp._build_params_for_reducer()
        if parameters:
            names = ddp._build_debug_param_to_name_mapping(parameters)
            ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
            if ddp.static_graph:
                ddp.reducer._set_static_graph()
