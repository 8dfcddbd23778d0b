"""DistributedDataParallel told of leaves, which it did not find among the parameters of the model that it wraps."""

import operator
import weakref

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..._torch import PastSubclasses, active_ddp, reduce_these
from .link import Link

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


def tell_active():
    """Tells the wrapper whose forward runs, if one does."""
    if (wrapper := active_ddp()) is not None:
        with PastSubclasses():
            tell(wrapper)


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
        reduce_these(ddp, listed)
