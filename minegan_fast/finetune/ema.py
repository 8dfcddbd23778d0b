"""The exponential moving average of what trains, as a model."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from ..ops import write_rows
from .rows.parameters import HeldWeight


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
        if link is None or link.rows is None:
            parameter.copy_(mean.view_as(parameter))
        else:
            write_rows(parameter, link.axis, link.rows, mean)
    return copied
