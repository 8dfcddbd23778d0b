"""Several processes: the same neurons and the same gradients on every rank."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .._torch import compiled_module
from ..collectives import active


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DDP and torch.compile's wrapper: names are those of the model itself."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif (inner := compiled_module(model)) is not None:
            model = inner
        else:
            return model


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
