"""The steps of an optimizer's parameter groups, planned once and repeated, and a model of the averages they keep."""

import copy
from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor, nn

from .._torch import own_grad
from ..ops import Hyperparameters, RowTensor, RowUpdate, write_rows
from ..ops.row_update import dense_step
from .neurons import Member
from .rows.link import Ledger
from .rows.parameters import HeldWeight


class Updates:
    """The steps of one optimizer, whose groups and `state` are as torch.optim has them.

    A plan is what `row_update` reads of a group's tensors. It holds until other parameters or another state are in
    their place.
    """

    def __init__(self, optimizer: str, ema_decay: float | None):
        self.optimizer, self.ema_decay = optimizer, ema_decay
        self._plans: dict[int, tuple[RowUpdate, Ledger | None]] = {}  # of a group, by its number

    def forget(self):
        self._plans.clear()

    def step(
        self,
        index: int,
        group: dict,
        state: MutableMapping,
        of_leaves: bool,
        scale: Tensor | None,
        found_inf: Tensor | None,
    ):
        """One step of a parameter group; where its parameters are leaves, of their weights too."""
        momentum = bool(group.get("momentum")) and self.optimizer == "sgd"
        plan, ledger = self._plans.get(index, (None, None))
        parameters = group["params"]
        if plan is None or plan.momentum != momentum or not _fits(plan, parameters, state):
            if of_leaves:
                for p in parameters:
                    p.link.sync()
                ledger = Ledger.join([p.link for p in parameters])
            tensors = [RowTensor(p, state[p], *_tied(p)) for p in parameters]
            plan = RowUpdate(self.optimizer, tensors, momentum, self.ema_decay is not None)
            self._plans[index] = plan, ledger
        moved = None if ledger is None else ledger.sync() and plan.moved()
        plan.step([own_grad(p) for p in parameters], self._hyper(group, self.ema_decay), scale, found_inf, moved)
        if ledger is not None:
            ledger.settle()

    def dense_step(self, member: Member, grad: Tensor, group: dict, state: dict):
        """One ordinary step of a whole candidate parameter, as criterion "movement" measures it."""
        dense_step(self.optimizer, RowTensor(member.parameter, state), grad, self._hyper(group, None))

    def _hyper(self, group: dict, ema_decay: float | None) -> Hyperparameters:
        names = ("momentum",) if self.optimizer == "sgd" else ("betas", "eps")
        options = {name: group[name] for name in (*names, "weight_decay")}
        return Hyperparameters(group["lr"], **options, ema_decay=ema_decay)


def _tied(parameter: nn.Parameter) -> tuple:
    """The weight, rows and axis of a leaf; nothing of an added parameter."""
    link = getattr(parameter, "link", None)
    return () if link is None else (link.weight, link.rows, link.axis)


def _fits(plan: RowUpdate, parameters: list[nn.Parameter], state: Mapping) -> bool:
    """Whether the plan is of these parameters and this state: someone may have put others there."""
    if len(plan.tensors) != len(parameters):
        return False
    return not parameters or (
        plan.tensors[-1].leaf is parameters[-1] and plan.tensors[-1].state is state.get(parameters[-1])
    )


@torch.no_grad()
def ema_model(state: Mapping, module: nn.Module) -> nn.Module:
    """A plain deep copy of `module` in which the rows and parameters that have an average in the optimizer's `state`
    have its values."""
    copied = copy.deepcopy(module)
    live = dict(module.named_parameters())
    for name, parameter in copied.named_parameters():
        source = live[name]
        link = source.link if isinstance(source, HeldWeight) else None
        mean = state.get(source if link is None else link.leaf, {}).get("ema")
        if mean is None:
            continue
        if link is None or link.leaf is None:
            parameter.copy_(mean.view_as(parameter))
        else:
            write_rows(parameter, link.axis, link.rows, mean)
    return copied
