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
        held = isinstance(source, HeldWeight)
        mean = state.get(source.link.leaf if held else source, {}).get("ema")
        if mean is not None and held:
            write_rows(parameter, source.link.axis, source.link.rows, mean)
        elif mean is not None:
            parameter.copy_(mean.view_as(parameter))
    return copied
