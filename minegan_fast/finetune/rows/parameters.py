"""How a sparse network is held: compact trainable rows, linked to weights that no longer train.

The selected rows of a weight become a `LeafParameter` [k, ...]. The weight keeps its place, its identity and its
storage; its class becomes `HeldWeight`, whose `__torch_function__` sees every use. Linear layers and convolutions
compute the gradient of the k rows alone (layers.py), also of W·c, W[0], Wᵀ or W/σ (expressions.py). Any other use is
given an alias: the same memory with a backward that hands the k rows of the whole gradient to the leaf,

    alias = W,    dL/drows = (dL/dalias)[rows].

Both are differentiable to any order, so every use of the weight is right, in any layer, and none needs to be known.
After a step the rows are written through to the weight, which the forward reads without a copy.
"""

import functools
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..._torch import (
    PastSubclasses,
    descriptor,
    is_in_torch_dispatch_mode,
    is_tracing,
    is_view,
    own_data,
    own_grad,
    own_requires_grad,
    parameter_is_made,
    set_own_grad,
    untraced,
)
from ...ops.modulated_conv2d import own_weights
from . import ddp
from .containers import map_tensors
from .expressions import SHARING, Expression, expression_of, follow
from .layers import dispatch, modulated_rows
from .link import Link


class LeafParameter(nn.Parameter):
    """The compact leaf [k, ...] of the selected rows of one weight; `link` leads there."""

    link: Link

    @property
    def data(self):
        self.link.sync()
        return self.link.lend(own_data(self), leaf=True)

    @data.setter
    def data(self, value):
        if value.shape != self.shape:
            raise ValueError(f"the rows {list(self.shape)} of a weight were given data of shape {list(value.shape)}")
        self.link.set_leaf(value)

    @property
    def grad(self):
        if not is_in_torch_dispatch_mode():  # the compiler looks at it too
            new = self.link.replacement()
            if new is not None and new.grad is not None:  # else its gradient may be under way
                self.link.reclaim()
            self.link.gradient.settle()
        return own_grad(self)

    @grad.setter
    def grad(self, value):
        self.link.gradient.forget()
        set_own_grad(self.link.weight, None)
        set_own_grad(self, value)

    @grad.deleter
    def grad(self):
        self.grad = None

    @property
    def requires_grad(self):
        return own_requires_grad(self)

    @requires_grad.setter
    def requires_grad(self, flag):
        self.requires_grad_(flag)

    def requires_grad_(self, requires_grad=True):
        _require_grad(self.link.weight, requires_grad)
        return self

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), nn.Parameter(self.detach().clone(), self.requires_grad))

    def __reduce_ex__(self, protocol):
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


# Getters that yield views of the values; all other attributes are read from the weight itself.
VIEWS = {descriptor(name) for name in ("T", "mT", "H", "mH", "real", "imag")}

_DATA, _GRAD, _REQUIRES_GRAD = map(descriptor, ("data", "grad", "requires_grad"))


class HeldWeight(nn.Parameter):
    """A weight whose selected rows train in a leaf; without a leaf, a frozen one.

    It reads as the plain parameter that it was. `copy.deepcopy` and pickling give that parameter back,
    `requires_grad_()` turns the leaf on and off, and `grad` has the weight's own shape (gradient.py).

    Its flag in the autograd engine is that of the leaf. A function that looks past `__torch_function__` therefore
    brings the weight a whole gradient, and the leaf gets its rows.
    """

    held = True
    link: Link

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            if _is_more_than_arithmetic(func):
                return _in_python(func, args, kwargs)
            return func(*map_tensors(_traced, args, _TYPES), **map_tensors(_traced, kwargs, _TYPES))
        ddp.tell_active()
        if is_tracing():  # which knows the weight, and no leaf
            with PastSubclasses():
                return func(*args, **kwargs)
        if func in _ON_LEAF:
            return func(*map_tensors(_leaf, args, _TYPES), **map_tensors(_leaf, kwargs, _TYPES))
        if func is torch.autograd.grad:
            return func(*map_tensors(_refused, args, _TYPES), **map_tensors(_refused, kwargs, _TYPES))
        with PastSubclasses():
            special = _SPECIAL.get(func)
            if special is not None:
                return special(*args, **kwargs)
            attribute = getattr(func, "__name__", "") in ("__get__", "__set__") and func.__self__ not in VIEWS
            if attribute or func in _SHAPELIKE:
                return func(*args, **kwargs)
            return differentiate(func, args, kwargs)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.link.wanted)
            memo[id(self)].__class__ = self.link.kind
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return nn.Parameter(self.detach(), self.link.wanted).__reduce_ex__(protocol)


@functools.cache
def held_class(kind: type) -> type:
    """What a parameter of class `kind` is while it is held: still one of its class."""
    return (
        HeldWeight if kind is nn.Parameter else type(kind.__name__, (HeldWeight, kind), {"__module__": kind.__module__})
    )


class RowWise(torch.Tensor):
    """The result of a row-wise expression of held weights (expressions.py). It can be used like any other tensor.

    A write reaches whatever shares its memory: the weight that it is a view of, or the expression and all views of it.
    """

    expression: Expression  # until it is plain
    plain: torch.Tensor | None  # what it has become where someone wrote to it, or hooked it into the graph
    weight: HeldWeight | None = None  # whose memory this is
    base: "RowWise | None" = None  # whose memory this is, where that is no weight's; `view` leads there
    view: Callable[[torch.Tensor], torch.Tensor]
    views: tuple[weakref.ref, ...] = ()  # those whose base this is

    @staticmethod
    def of(expression: Expression) -> "RowWise":
        result = expression.weight.as_subclass(RowWise)
        result.expression, result.plain = expression, None
        if expression.trained is not None and expression.trained.requires_grad and torch.is_grad_enabled():
            # A function of another library that looks past __torch_function__ finds a leaf of its own here.
            result.requires_grad_()
            result.register_hook(functools.partial(_hand_on, expression))
        return result

    def share(self, base, func, args, kwargs):
        """Notes that this is func(base, *args, **kwargs), where it is a view of a held weight or of another RowWise."""
        if isinstance(base, HeldWeight) or base.weight is not None:
            self.weight = base if isinstance(base, HeldWeight) else base.weight
        else:
            self.base, self.view = base, lambda tensor: func(tensor, *args, **kwargs)
            base.views += (weakref.ref(self),)

    def settle(self, use: str):
        """Becomes an ordinary tensor, together with all that share its memory."""
        source = None if self.base is None else self.base.plain
        if self.base is not None and source is None:
            return self.base.settle(use)
        with torch.enable_grad():
            self.plain = self.expression.value(use).clone() if source is None else self.view(source)
        del self.expression
        for view in self.views:
            if (x := view()) is not None:
                x.settle(use)
        return None

    def reach(self, func, args, kwargs):
        """A write into the memory of the held weight, or a look at it."""
        (link,) = self.expression.links
        if func == _DATA.__get__:
            return link.lend(own_data(self.expression.weight))
        name = func.__name__
        _refuse_write(self.weight, name)
        func(self.expression.weight, *map_tensors(_ordinary, args[1:], _TYPES, name), **kwargs)
        link.sync()
        return None if func is torch.Tensor.__setitem__ else self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with PastSubclasses():
            first = args[0] if args and isinstance(args[0], RowWise) else None
            if first is not None and first.plain is None:
                if func in _SHAPELIKE:
                    return func(first.expression.weight, *args[1:], **kwargs)
                if func == _REQUIRES_GRAD.__get__:
                    return first.expression.trained is not None or first.expression.factor is not None
                name = getattr(func, "__name__", "")
                writes = _is_in_place(name) or name == "__setitem__"
                if first.weight is not None and (writes or func == _DATA.__get__):
                    return first.reach(func, args, kwargs)
                if writes or (name in _CHANGING and getattr(func, "__self__", None) not in VIEWS):
                    first.settle(name)
            result = differentiate(func, args, kwargs)
            return first if first is not None and result is first.plain else result


_TYPES = (HeldWeight, RowWise)
own_weights.update(dict.fromkeys(_TYPES, modulated_rows))


def _hand_on(expression: Expression, grad: torch.Tensor):
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        value = expression.value("a function of another library")
    torch.autograd.backward(value, grad, create_graph=further)


def _is_more_than_arithmetic(func) -> bool:
    """Whether it writes into a weight, or asks for its gradient or its memory. By names, which Dynamo can read."""
    name = func.__name__
    if name == "__get__":
        return func.__self__.__name__ in ("grad", "data")
    return name[-1:] == "_" and (name[-2:] != "__" or name in ("__set__", "__delete__", "__setitem__"))


@untraced
def _in_python(func, args, kwargs):
    return HeldWeight.__torch_function__(func, (), args, kwargs)


def differentiate(func, args, kwargs):
    """func(*args, **kwargs) as a differentiable function of the leaves of the weights among the arguments."""
    for x in (*args, *kwargs.values()):
        if type(x) is RowWise and x.plain is not None:
            args = tuple(_settled(x) for x in args)
            kwargs = {name: _settled(x) for name, x in kwargs.items()}
            break
    result = dispatch(func, args, kwargs)
    if result is NotImplemented:
        expression = follow(func, args, kwargs)
        if expression is not NotImplemented:
            result = RowWise.of(expression)
            if func in SHARING and args[0].data_ptr() == result.data_ptr():
                result.share(args[0], func, args[1:], kwargs)
            return result
        name = getattr(func, "__name__", "")
        if args and _is_in_place(name):
            map_tensors(_refuse_write, args[0], HeldWeight, name)
        result = func(*map_tensors(_ordinary, args, _TYPES, name), **map_tensors(_ordinary, kwargs, _TYPES, name))
    return result


def _settled(x):
    return x.plain if type(x) is RowWise and x.plain is not None else x


def _ordinary(x: HeldWeight | RowWise, name: str) -> torch.Tensor:
    """What a function that knows nothing of rows is given in the place of x."""
    if isinstance(x, RowWise):
        return x.expression.value(name) if x.plain is None else x.plain
    expression = expression_of(x)
    if expression is None or expression.trained is None or not torch.is_grad_enabled():
        x.link.sync()
        return x.link.alias()
    return expression.value(name)


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _refuse_write(p, name: str):
    if p.link.leaf is not None and p.link.leaf.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: a parameter that trains was used in an in-place operation; do so in torch.no_grad()"
        )


def _traced(p):
    return p.link.traced()


def _leaf(p):
    if p.link.leaf is None:
        raise RuntimeError("this weight is frozen: no row of it is selected, so nothing can be differentiated by it")
    return p.link.leaf


def _refused(p):
    if not isinstance(p, HeldWeight):
        return _ordinary(p, "grad")
    raise RuntimeError(
        "torch.autograd.grad by a weight that trains by rows: ask for the gradients of the optimizer's leaves, "
        "ft.parameters(), or call backward() and read the weight's grad"
    )


def _require_grad(p, flag=True):
    p.link.wanted = flag
    if p.link.leaf is not None:
        with PastSubclasses():
            torch.Tensor.requires_grad_(p.link.leaf, flag)
            torch.Tensor.requires_grad_(p, flag)
    return p


def _same(view):
    """A view in the weight's own shape stays plain: scripts find the node of its complete gradient by one."""
    return lambda x, other: view(x, other) if x is other else differentiate(view, (x, other), {})


def _detach(p):
    if parameter_is_made(2):
        raise RuntimeError(
            "a weight that trains by rows was made a parameter once more, as by a parametrization: give "
            "nn.Parameter(weight.detach()), or release() the model first"
        )
    p.link.sync()
    return torch.Tensor.detach(p)


def _get_data(p):
    p.link.sync()
    return p.link.lend(own_data(p))


def _set_data(p, value):
    if value.shape != p.shape:
        raise ValueError(
            f"a sparsely finetuned weight of shape {list(p.shape)} was given data of shape {list(value.shape)}; "
            "release() the model first, and build a new SparseFinetuner on the resized one"
        )
    p.link.set_weight(value)


def _get_grad(p):
    return own_grad(p) if is_in_torch_dispatch_mode() else p.link.gradient.read()


def _hook(register):
    def hook(p, function):
        Link.epoch += 1  # DDP has to reduce the weight itself
        return register(p, function)

    return hook


def _note_writes(optimizer, args, kwargs):
    """After a step of any optimizer: torch's fused ones write to leaves and to weights without a trace."""
    if not getattr(optimizer, "writes_through", False):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            is_leaf, is_weight = type(p) is LeafParameter, getattr(type(p), "held", False)
            if is_leaf or is_weight:
                p.link.access(is_weight, is_leaf)


@functools.cache
def watch_optimizers():
    """From the first leaf on."""
    register_optimizer_step_post_hook(_note_writes)


# What reads no value.
_SHAPELIKE = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "is_cuda")),
    *(getattr(torch.Tensor, name).__get__ for name in ("is_sparse", "is_quantized", "is_nested", "is_mkldnn")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "nelement", "stride", "is_contiguous")),
    *(getattr(torch.Tensor, name) for name in ("is_floating_point", "is_complex", "element_size", "__len__")),
}

# What writes to a tensor, or shows its place in the graph.
_CHANGING = {"retain_grad", "register_hook", "register_post_accumulate_grad_hook", "__get__", "__set__"}

_SPECIAL = {
    _DATA.__get__: _get_data,
    _DATA.__set__: _set_data,
    _GRAD.__get__: _get_grad,
    _GRAD.__set__: lambda p, value: p.link.gradient.write(value),
    _GRAD.__delete__: lambda p: p.link.gradient.write(None),
    **dict.fromkeys((torch.Tensor.detach, torch.detach), _detach),
    torch.Tensor.view_as: _same(torch.Tensor.view_as),
    torch.Tensor.expand_as: _same(torch.Tensor.expand_as),
    _REQUIRES_GRAD.__set__: _require_grad,
    torch.Tensor.requires_grad_: _require_grad,
    torch.Tensor.register_hook: _hook(torch.Tensor.register_hook),
    torch.Tensor.register_post_accumulate_grad_hook: _hook(torch.Tensor.register_post_accumulate_grad_hook),
    is_view: is_view,  # the alias is one, the weight is not
    # They turn gradients off themselves.
    **{f: f for name, f in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")},
}

# With respect to a linked weight, these mean its leaf.
_ON_LEAF = {torch.autograd.backward, torch.Tensor.backward}
