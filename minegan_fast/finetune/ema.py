"""The exponential moving average of what trains, as a model."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ops import write_rows
from .rows.parameters import HeldWeight


@torch.no_grad()
def ema_model(state: Mapping[Tensor, dict], module: nn.Module) -> nn.Module:
    """A plain deep copy of `module` in which the rows and parameters that have an average in the optimizer's `state`
    have its values."""
    copied = copy.deepcopy(module)
    live = dict(module.named_parameters())
    for name, parameter in copied.named_parameters():
        source = live[name]
        held = isinstance(source, HeldWeight)
        trained = source.link.leaf if held else source
        mean = state[trained].get("ema") if trained in state else None
        if mean is None:
            continue
        if held:
            write_rows(parameter, source.link.axis, source.link.rows, mean)
        else:
            parameter.copy_(mean.view_as(parameter))
    return copied
