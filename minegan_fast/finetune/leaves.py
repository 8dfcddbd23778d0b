"""How a sparse network is held: compact trainable rows, linked to dense weights that no longer train.

The selected rows of a weight become a leaf parameter `Rows` [k, ...]. The dense weight keeps its place, its identity
and its storage; its class becomes `Linked`, whose `__torch_function__` replaces it, wherever it enters a differentiable
computation, by an alias: the same memory with a backward that hands the k rows of the dense gradient to the leaf,

    alias = W,    dL/drows = (dL/dalias)[rows],

differentiable to any order. So every use of the weight is right, in any layer, and none needs to be known: equalised
learning rates, spectral norm, shared weights. After a step the rows are written through to the dense weight, which the
forward reads without a copy.
"""

import torch
from torch import nn


class Rows(nn.Parameter):
    """The compact leaf [k, ...] of the selected rows of one dense weight; `link` leads there."""

    @property
    def data(self):
        self.link.sync()
        self.link.access(leaf=True)
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        self.link.set_leaf(value)

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), nn.Parameter(self.detach().clone(), self.requires_grad))

    def __reduce_ex__(self, protocol):
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


# Getters that yield views of the values; all other attributes are read from the dense weight itself.
_VIEWS = {getattr(torch.Tensor, name) for name in ("T", "mT", "H", "mH", "real", "imag")}


class Linked(nn.Parameter):
    """A dense weight whose selected rows train in a leaf; without a leaf, a frozen one.

    It reads as the plain parameter that it was, `copy.deepcopy` and pickling give that parameter back, and
    `requires_grad_()` turns the leaf on and off. A faster gradient for `F.linear` or a convolution belongs into
    `__torch_function__`, in front of the aliases: there the op, its arguments and the link are at hand.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            return func(*_map(_traced, args), **_map(_traced, kwargs))
        if func in _ON_LEAF:
            return func(*_map(_leaf, args), **_map(_leaf, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            special = _SPECIAL.get(func)
            if special is not None:
                return special(*args, **kwargs)
            if getattr(func, "__name__", "") in ("__get__", "__set__") and func.__self__ not in _VIEWS:
                return func(*args, **kwargs)
            return func(*_map(_alias, args), **_map(_alias, kwargs))

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.link.trainable)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return nn.Parameter(self.detach(), self.link.trainable).__reduce_ex__(protocol)


def _map(f, x):
    if isinstance(x, Linked):
        return f(x)
    if isinstance(x, dict):
        return {k: _map(f, v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        items = [_map(f, v) for v in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x


def _alias(p):
    if p.link.leaf_written():
        p.link.sync()
    return p.link.alias()


def _traced(p):
    return p.link.traced()


def _leaf(p):
    if p.link.leaf is None:
        raise RuntimeError("this weight is frozen: no row of it is selected, so nothing can be differentiated by it")
    return p.link.leaf


def _require_grad(p, flag=True):
    if p.link.leaf is not None:
        p.link.leaf.requires_grad_(flag)
    return p


def _get_data(p):
    p.link.sync()
    p.link.access(dense=True)
    return torch.Tensor.data.__get__(p)


def _set_data(p, value):
    p.link.set_dense(value)


def _set_grad(p, value):
    if value is not None:
        raise RuntimeError(
            "this weight trains by its selected rows only; give their gradient to the leaf parameter: "
            "`weight.link.leaf.grad`"
        )
    if p.link.leaf is not None:
        p.link.leaf.grad = None


_SPECIAL = {
    torch.Tensor.data.__get__: _get_data,
    torch.Tensor.data.__set__: _set_data,
    torch.Tensor.grad.__set__: _set_grad,
    torch.Tensor.requires_grad.__set__: _require_grad,
    torch.Tensor.requires_grad_: _require_grad,
    torch.Tensor._is_view: torch.Tensor._is_view,  # the alias is one, the weight is not
}

# With respect to a linked weight, these mean its leaf.
_ON_LEAF = {
    torch.autograd.grad,
    torch.autograd.backward,
    torch.Tensor.backward,
    torch.Tensor.register_hook,
    torch.Tensor.register_post_accumulate_grad_hook,
}
