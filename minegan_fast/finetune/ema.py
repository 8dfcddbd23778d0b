"""The exponential moving average of what trains, as a model."""

import copy

import torch
from torch import nn

from .rows.parameters import HeldWeight


@torch.no_grad()
def ema_model(ft, module: nn.Module) -> nn.Module:
    """A plain deep copy of `module` in which the rows and parameters that `ft` trains have their EMA's values."""
    average = copy.deepcopy(module)
    live = dict(module.named_parameters())
    for name, parameter in average.named_parameters():
        source = live[name]
        trained = source.link.leaf if isinstance(source, HeldWeight) else source
        mean = ft.state[trained].get("ema") if trained in ft.state else None
        if mean is None:
            continue
        if not isinstance(source, HeldWeight) or parameter.ndim == 0:
            parameter.copy_(mean.view_as(parameter))
        else:
            link = source.link
            values = mean.movedim(0, link.axis).to(parameter.dtype)
            parameter.index_copy_(link.axis, link.rows.to(mean.device), values)
    return average
