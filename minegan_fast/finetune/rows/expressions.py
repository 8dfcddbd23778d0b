"""Row-wise expressions of held weights, followed as far as the layer that uses them.

Row r of W·c, W², W[0] or Wᵀ depends on row r of W alone. Such an expression is computed twice: for all rows without a
graph, and for the selected rows from their leaf. `layers.py` takes both, so that the gradient of the other rows never
exists. Any other use makes an ordinary tensor of the expression; its gradient is computed whole, and the rows are taken
from it.

A factor that depends on all rows, as the σ of spectral norm does, stays outside: conv(x, W s) = s conv(x, W).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import apply_function, descriptor
from .link import Alias, Link


class Expression(NamedTuple):
    """A held weight, or what was computed from one row by row.

    weight: all rows, without a graph. trained: those of `rows` along the same `axis`, with the graph from
        their leaf; None, and no rows, where none trains. links: of the held weights that it was computed from.
    factor: what both are still to be multiplied by, 0-d and differentiable, or None.
    """

    weight: Tensor
    trained: Tensor | None
    rows: Tensor
    axis: int
    links: tuple[Link, ...]
    factor: Tensor | None = None

    def value(self, use: str) -> Tensor:
        """An ordinary tensor, whose gradient is computed whole. use: the function that needs it, for the summary."""
        value = self.weight
        if self.trained is not None and value.ndim == 1:  # small: a copy by one native op costs less than the alias
            value = value.index_copy(0, self.rows, self.trained.to(value.dtype))
        elif self.trained is not None:
            value = apply_function(
                Alias, self.trained.movedim(self.axis, 0), self.weight, self.rows, self.axis, self.links, use
            )
        return value if self.factor is None else value * self.factor.to(value.dtype)

    def mapped(self, function: Callable[[Tensor], Tensor], axis: int | None = None) -> "Expression":
        """function of all rows, and of those that train; axis: the one that they lie along then, if it is another."""
        trained = None if self.trained is None else function(self.trained)
        return self._replace(weight=function(self.weight), trained=trained, axis=self.axis if axis is None else axis)

    def transposed(self) -> "Expression":
        """Of a matrix."""
        return self.mapped(Tensor.t, 1 - self.axis)

    def to(self, dtype: torch.dtype) -> "Expression":
        return self.mapped(lambda w: w.to(dtype))


def expression_of(x) -> Expression | None:
    """The expression that an argument stands for; None where it is neither a held weight nor made of one."""
    if not isinstance(x, Tensor):
        return None
    attributes = x.__dict__
    if "expression" in attributes:
        return attributes["expression"]
    link = attributes.get("link")
    if link is None or link.weight is not x or x.ndim < 1 or link.hooked:
        return None
    link.sync()
    trained = None
    if link.leaf is not None and link.leaf.requires_grad:
        trained = link.leaf if link.axis == 0 else link.leaf.movedim(0, link.axis)
    return Expression(x.detach(), trained, link.rows, link.axis, (link,))


def _matrix(x) -> Expression | None:
    """The expression of an argument that is worth following. A vector is not: its whole gradient costs nothing."""
    e = expression_of(x)
    return None if e is None or e.weight.ndim < 2 else e


def follow(func, args, kwargs) -> Expression:
    """func(*args, **kwargs) where it is row-wise in its held weights; NotImplemented where it is not."""
    if func in _TRANSPOSES:
        func = torch.Tensor.t
    rule = _RULES.get(func)
    if rule is None or not args or "out" in kwargs or not torch.is_grad_enabled():
        return NotImplemented
    return rule(func, args, kwargs)


def _apply(e: Expression, func, args, kwargs, axis: int, factor: Tensor | None):
    # No gradient is asked of all rows, nor of what they are computed with.
    return e.mapped(lambda w: func(w, *args, **kwargs), axis)._replace(factor=factor)


def _is_constant(x) -> bool:
    return isinstance(x, int | float) or (type(x) is Tensor and x.ndim == 0 and not x.requires_grad)


def _pointwise(func, args, kwargs):
    e = _matrix(args[0])
    if e is None or e.factor is not None or not all(_is_constant(a) for a in (*args[1:], *kwargs.values())):
        return NotImplemented
    return _apply(e, func, args[1:], kwargs, e.axis, None)


def _cast(func, args, kwargs):
    e = _matrix(args[0])
    if e is None or any(isinstance(a, Tensor | torch.device | str) for a in (*args[1:], *kwargs.values())):
        return NotImplemented
    return _apply(e, func, args[1:], kwargs, e.axis, e.factor)


def _scaled(func, args, kwargs):
    """mul and div: by a number, by a factor of all rows, or row by row by another expression of the same rows."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    e, other = _matrix(args[0]), args[1]
    if e is None and func.__name__ == "mul" and _matrix(other) is not None:
        e, other = _matrix(other), args[0]
    if e is None:
        return NotImplemented
    if _is_constant(other):
        return _apply(e, func, (other,), {}, e.axis, e.factor)
    if type(other) is Tensor and other.numel() == 1 and other.ndim == 0:
        factor = other if func.__name__ == "mul" else other.reciprocal()
        return e._replace(factor=factor if e.factor is None else e.factor * factor)
    return _pairwise(func, args, kwargs)


def _pairwise(func, args, kwargs):
    """add, sub, mul, div of two expressions of the same rows, or with a number."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    a, b = _matrix(args[0]), _matrix(args[1])
    if a is not None and _is_constant(args[1]):
        return _pointwise(func, args, kwargs)
    if a is None or b is None or a.factor is not None or b.factor is not None:
        return NotImplemented
    same = (a.trained is None) == (b.trained is None) and a.weight.ndim == b.weight.ndim and a.axis == b.axis
    same = same and a.weight.shape[a.axis] == b.weight.shape[b.axis]
    if not same or (a.trained is not None and a.rows is not b.rows and not torch.equal(a.rows, b.rows)):
        return NotImplemented
    weight = func(a.weight, b.weight)
    trained = None if a.trained is None else func(a.trained, b.trained)
    return a._replace(weight=weight, trained=trained, links=tuple(dict.fromkeys(a.links + b.links)))


def _reduced(func, args, kwargs):
    """Over axes that are named and are not the neurons'."""
    e = _matrix(args[0])
    dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    dims = (dims,) if isinstance(dims, int) else dims
    if e is None or e.factor is not None or not dims or not all(type(d) is int for d in dims):
        return NotImplemented
    if len(args) > 2 and func.__name__ in ("std", "var"):  # whose third argument is another
        return NotImplemented
    dims = {d % e.weight.ndim for d in dims}
    if e.axis in dims:
        return NotImplemented
    keep = kwargs.get("keepdim", kwargs.get("keepdims", len(args) > 2 and args[2] is True))
    return _apply(e, func, args[1:], kwargs, e.axis if keep else e.axis - sum(d < e.axis for d in dims), None)


def _moved(func, args, kwargs):
    """transpose, t, permute, unsqueeze. A tensor whose sizes are all different shows where the neurons' axis went."""
    e = _matrix(args[0])
    if e is None or (func is torch.Tensor.t and e.weight.ndim != 2):
        return NotImplemented
    shape = list(range(2, 2 + e.weight.ndim))
    moved = func(torch.empty(shape, device="meta"), *args[1:], **kwargs)
    return _apply(e, func, args[1:], kwargs, list(moved.shape).index(shape[e.axis]), e.factor)


def _indexed(func, args, kwargs):
    """w[0] and w[None] in front of the neurons' axis."""
    e, index = _matrix(args[0]), args[1]
    if e is None or not (index is None or (type(index) is int and e.axis > 0)):
        return NotImplemented
    return _apply(e, func, args[1:], kwargs, e.axis + (1 if index is None else -1), e.factor)


def _reshaped(func, args, kwargs):
    """view, reshape, flatten, as long as the neurons' axis is the first one longer than 1 and stays so."""
    e = _matrix(args[0])
    if e is None or e.weight.shape[e.axis] == 1 or any(size > 1 for size in e.weight.shape[: e.axis]):
        return NotImplemented
    if any(isinstance(a, torch.dtype) for a in (*args[1:], *kwargs.values())):
        return NotImplemented
    weight = func(e.weight, *args[1:], **kwargs)
    axis = next((i for i, size in enumerate(weight.shape) if size > 1), 0)
    if weight.shape[axis] != e.weight.shape[e.axis]:
        return NotImplemented
    trained = e.trained
    if trained is not None:
        trained = trained.reshape(*weight.shape[:axis], trained.shape[e.axis], *weight.shape[axis + 1 :])
    return e._replace(weight=weight, trained=trained, axis=axis)


_NAMED = {
    **dict.fromkeys(("neg", "square", "pow", "abs", "sqrt", "rsqrt", "exp"), _pointwise),
    **dict.fromkeys(("to", "float", "double", "half", "bfloat16", "contiguous"), _cast),
    **dict.fromkeys(("mul", "div", "true_divide"), _scaled),
    **dict.fromkeys(("add", "sub"), _pairwise),
    **dict.fromkeys(("sum", "mean", "std", "var"), _reduced),
    **dict.fromkeys(("transpose", "swapaxes", "t", "permute", "movedim", "unsqueeze"), _moved),
    **dict.fromkeys(("view", "reshape", "flatten"), _reshaped),
    "__getitem__": _indexed,
}

_RULES = {
    getattr(owner, name): rule
    for name, rule in _NAMED.items()
    for owner in (torch.Tensor, torch)
    if hasattr(owner, name)
}
_TRANSPOSES = {descriptor(name).__get__ for name in ("T", "mT")}

# Whose result may be a view of their argument, or the argument itself.
SHARING = {func for func, rule in _RULES.items() if rule in (_cast, _moved, _indexed, _reshaped)} | _TRANSPOSES
