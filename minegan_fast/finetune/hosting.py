"""Putting leaves into a model and taking them out: the modules list them, and nothing that is stored knows of them."""

import copy
import copyreg
import functools
import sys

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .leaves import Linked, Rows
from .link import Link, master_dtype
from .neurons import compact


def _leaves_last(listed) -> list[tuple[str, nn.Parameter]]:
    return sorted(listed, key=lambda item: isinstance(item[1], Rows))


class _Host:
    """Mixed into the class of a module that has leaves in it, itself or below.

    `parameters()` lists leaves, so that clipping and `zero_grad()` find them, behind all dense parameters: code that
    zips the parameters of a copy with those of the live model still pairs them rightly. `named_parameters()` has the
    names of the state dict, as averages by name need it, and lists leaves for DDP alone. `state_dict()`,
    `load_state_dict()`, `copy.deepcopy` and pickling pass them over.
    """

    def parameters(self, recurse=True):
        yield from (p for _, p in _leaves_last(super().named_parameters(recurse=recurse)))

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        listed = super().named_parameters(prefix, recurse, remove_duplicate)
        if sys._getframe(1).f_globals.get("__name__") == DistributedDataParallel.__module__:
            return iter(_leaves_last(listed))
        return ((name, p) for name, p in listed if not isinstance(p, Rows))

    def __setattr__(self, name, value):
        held = self.__dict__.get("_parameters", {}).get(name)
        if isinstance(held, Linked) and value is not held and not self.__dict__.get("_loading"):
            raise RuntimeError(
                f"{name!r} of a {type(self).__name__} is finetuned sparsely and was to be replaced; write into it "
                "(copy_, load_state_dict), or release() the model first"
            )
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in self._parameters.items():
            if isinstance(parameter, Rows):
                del destination[prefix + name]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        leaves = {name: p for name, p in self._parameters.items() if isinstance(p, Rows)}
        linked = {name: p for name, p in self._parameters.items() if isinstance(p, Linked)}
        for name in leaves:
            del self._parameters[name]
        self.__dict__["_loading"] = True
        try:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        finally:
            for name, parameter in linked.items():
                if self._parameters[name] is not parameter:  # load_state_dict(assign=True) put a new tensor there
                    parameter.data = self._parameters[name].data
                    setattr(self, name, parameter)
            del self.__dict__["_loading"]
            self._parameters.update(leaves)

    def __deepcopy__(self, memo):
        kind, parameters = type(self), self._parameters
        self._parameters = {name: p for name, p in parameters.items() if not isinstance(p, Rows)}
        self.__class__ = plain_class(self)  # which may copy itself in a way of its own, as parametrized modules do
        try:
            return copy.deepcopy(self, memo)
        finally:
            self.__class__, self._parameters = kind, parameters

    def __reduce_ex__(self, protocol):
        kind = plain_class(self)
        plain = object.__new__(kind)
        parameters = {name: p for name, p in self._parameters.items() if not isinstance(p, Rows)}
        plain.__dict__ = {**self.__dict__, "_parameters": parameters}
        function, arguments, *state = plain.__reduce_ex__(protocol)
        if function is copyreg.__newobj__:  # which pickle refuses for a class that is not the object's own
            function, arguments = copyreg._reconstructor, (kind, object, None)
        return function, arguments, *state


def plain_class(module: nn.Module) -> type:
    """The class that a module had before it held leaves."""
    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, _Host) else kind


@functools.cache
def _host_class(kind: type) -> type:
    return type(kind.__name__, (_Host, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def hold(model: nn.Module, parameter: nn.Parameter, axis: int, rows: Tensor | None) -> Rows | None:
    """Freezes `parameter` but for `rows` along `axis`, and returns their leaf (None without rows).

    The parameter may be held already, with other rows; its old leaf leaves the model, with its gradient.
    """
    masters = None
    if isinstance(parameter, Linked):
        link = parameter.link
        link.sync()
        if (link.rows is None) == (rows is None) and (rows is None or link.rows.tolist() == rows.tolist()):
            return link.leaf
        trainable, kind = link.trainable, link.kind
        if rows is not None and link.leaf is not None and link.leaf.dtype != parameter.dtype:
            masters = link.rows, link.leaf.detach()
        loosen(model, parameter)
    else:
        trainable, kind = parameter.requires_grad, type(parameter)
    leaf = None
    if rows is not None:
        rows = rows.to(parameter.device)
        values = compact(parameter.detach(), axis, rows)
        dtype = master_dtype(values.dtype)
        values = values.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if masters is not None:  # rows that stay keep what half precision would round away
            kept = torch.isin(rows, masters[0])
            values[kept] = masters[1][torch.searchsorted(masters[0], rows[kept])]
        leaf = Rows(values)
    parameter.requires_grad_(False)
    link = Link(parameter, leaf, rows, axis)
    link.trainable, link.kind = trainable, kind
    parameter.link = link
    parameter.grad = None
    parameter.__class__ = Linked
    if leaf is not None:
        leaf.link = link
        _register(model, parameter, leaf)
    return leaf


def _register(model, parameter, leaf):
    for module in model.modules():
        for name, candidate in module._parameters.items():
            if candidate is parameter:
                name += "_rows"
                while hasattr(module, name):
                    name += "_"
                module._parameters[name] = leaf
                return
    raise RuntimeError("the parameter left the model; build a new SparseFinetuner")


def loosen(model: nn.Module, parameter: nn.Parameter):
    """Gives back the plain parameter, its trained values in place, trainable as it was before it was held."""
    link = parameter.link
    link.sync()
    for module in model.modules():
        for name in [name for name, p in module._parameters.items() if p is not None and p is link.leaf]:
            del module._parameters[name]
    parameter.__class__ = link.kind
    del parameter.link
    if link.leaf is not None:
        link.leaf.__class__ = nn.Parameter
        del link.leaf.link
    parameter.requires_grad_(link.trainable)


def mark_hosts(model: nn.Module):
    """Gives every module with leaves in it the class of a host, and all others their own class back."""
    for module in model.modules():
        host = any(isinstance(p, Rows) for p in module.parameters())
        if host and not isinstance(module, _Host):
            module.__class__ = _host_class(type(module))
        elif not host:
            module.__class__ = plain_class(module)
