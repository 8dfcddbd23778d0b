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
from torch import Tensor, nn

from .neurons import compact


class _Alias(torch.autograd.Function):
    @staticmethod
    def forward(leaf, dense, rows, axis):
        return dense.view_as(dense)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, rows, ctx.axis = inputs
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return compact(grad, ctx.axis, rows), None, None, None


class Link:
    """What ties a leaf to its dense weight: which rows along which axis, and who wrote last.

    Both sides may be written from outside: `load_state_dict` and EMA copies write the dense weight, weight clipping the
    leaf. Version counters tell, and for writes through `.data`, which they miss, the access itself.
    """

    def __init__(self, dense: nn.Parameter, leaf: "Rows | None", rows: Tensor | None, axis: int):
        self.dense, self.leaf, self.rows, self.axis = dense, leaf, rows, axis
        self.trainable = dense.requires_grad
        self.kind = type(dense)
        self.dense_accessed = self.leaf_accessed = False
        self.plain = dense.data  # for the compiler, which cannot see past the subclass
        self.settle()

    def settle(self):
        """Declares leaf and dense equal."""
        self.dense_accessed = self.leaf_accessed = False
        if self.leaf is not None:
            self.versions = self.dense._version, self.leaf._version

    def leaf_written(self) -> bool:
        return self.leaf is not None and (self.leaf_accessed or self.leaf._version != self.versions[1])

    @torch.no_grad()
    def sync(self):
        """Makes leaf and dense equal after writes from outside; where both were written, the dense weight counts."""
        if self.leaf is None:
            return
        dense_changed, leaf_changed = (
            now != then for now, then in zip((self.dense._version, self.leaf._version), self.versions, strict=True)
        )
        if not (dense_changed or leaf_changed or self.dense_accessed or self.leaf_accessed):
            return
        with torch._C.DisableTorchFunctionSubclass():
            current = compact(self.dense, self.axis, self.rows)
            if current.device != self.leaf.device or current.dtype != self.leaf.dtype:
                return  # module.to() has converted one and comes to the other
            if not torch.equal(current, self.leaf):
                # a version is proof of a write, an access to .data only a suspicion
                if dense_changed or (self.dense_accessed and not leaf_changed):
                    self.leaf.copy_(current)
                else:
                    self.write()
        self.settle()

    @torch.no_grad()
    def write(self):
        """Writes the leaf through to the dense weight."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.dense.ndim == 0:
                self.dense.copy_(self.leaf.reshape(()))
            else:
                self.dense.index_copy_(self.axis, self.rows, self.leaf.movedim(0, self.axis))
        self.settle()

    def alias(self) -> Tensor:
        """The dense weight as a differentiable computation sees it."""
        if self.leaf is None or not self.leaf.requires_grad or not torch.is_grad_enabled():
            return self.dense
        return _Alias.apply(self.leaf, self.dense, self.rows, self.axis)

    def traced(self) -> Tensor:
        """`alias` for torch.compile, which refuses a Function that returns a view: the same values by a copy."""
        if self.leaf is None:
            return self.plain
        if self.plain.ndim == 0:
            return self.leaf.reshape(())
        return self.plain.index_copy(self.axis, self.rows, self.leaf.movedim(0, self.axis))


class Rows(nn.Parameter):
    """The compact leaf [k, ...] of the selected rows of one dense weight; `link` leads there."""

    @property
    def data(self):
        self.link.sync()
        self.link.leaf_accessed = True
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        self.link.sync()
        self.link.leaf_accessed = True
        torch.Tensor.data.__set__(self, value)

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
    p.link.dense_accessed = True
    return torch.Tensor.data.__get__(p)


def _set_data(p, value):
    p.link.sync()
    p.link.dense_accessed = True
    torch.Tensor.data.__set__(p, value)
    p.link.plain = torch.Tensor.data.__get__(p)
    if p.link.rows is not None:
        p.link.rows = p.link.rows.to(p.device)


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
