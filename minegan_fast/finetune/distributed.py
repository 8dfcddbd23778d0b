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


def check_gradients(groups: list[dict], group) -> bool:
    """Whether there was any gradient to compare. RuntimeError on every rank where the ranks' differ. Collective."""
    if not active(group):
        return True
    own = [_summary(p.grad) for g in groups for p in g["params"]]
    everyone: list = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyone, own, group=group)
    first = torch.tensor(everyone[0], dtype=torch.float64)
    for rank, other in enumerate(everyone):
        other = torch.tensor(other, dtype=torch.float64)
        # A projection of g may be much smaller than g, so both are compared in units of the norm.
        close = (other - first).abs() <= 1e-4 * first[:, :1].abs() + 1e-8
        if not (close | (other == first) | (other.isnan() & first.isnan())).all():
            raise RuntimeError(
                f"the gradients of ranks 0 and {rank} differ at the first step after a selection, so their networks "
                "would drift apart: wrap the model in DistributedDataParallel, or give SparseFinetuner process_group="
            )
    return any(norm != 0 for summaries in everyone for norm, _ in summaries)


def _summary(gradient: Tensor | None) -> tuple[float, float]:
    """The norm, and the projection onto a fixed direction, which tells gradients of equal length apart."""
    if gradient is None:
        return 0.0, 0.0
    g = gradient.detach().flatten().double()
    return float(g.norm()), float(g @ torch.arange(len(g), device=g.device, dtype=g.dtype).cos())
