"""Row-wise expressions of held weights, followed as far as the layer that uses them.

Row r of W·c, W², W[0] or Wᵀ depends on row r of W alone. Such an expression is computed twice, for all rows without a
graph and for the selected ones from their leaf, and `layers.py` takes both: its gradient goes to the selected rows and
never exists for the others. Any other use makes an ordinary tensor of it, whose dense gradient is gathered.

A factor that depends on all rows, as the σ of spectral norm does, stays outside: conv(x, W s) = s conv(x, W).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .link import Alias, Link


class Expression(NamedTuple):
    """dense: all rows, no graph. part: the selected ones, along the same `axis`, None where none trains. factor: what
    both are still to be multiplied by, 0-d and differentiable, or None."""

    dense: Tensor
    part: Tensor | None
    rows: Tensor | None
    axis: int
    links: tuple[Link, ...]
    factor: Tensor | None = None

    def value(self, use: str) -> Tensor:
        """An ordinary tensor, whose gradient is dense; it is said to come through the function `use`."""
        value = self.dense
        if self.part is not None and value.ndim == 1:  # small: a copy by one native op costs less than the alias
            value = value.index_copy(0, self.rows, self.part.to(value.dtype))
        elif self.part is not None:
            value = Alias.apply(self.part.movedim(self.axis, 0), self.dense, self.rows, self.axis, self.links, use)
        return value if self.factor is None else value * self.factor.to(value.dtype)

    def transposed(self) -> "Expression":
        """Of a matrix."""
        part = self.part if self.part is None else self.part.t()
        return self._replace(dense=self.dense.t(), part=part, axis=1 - self.axis)

    def to(self, dtype: torch.dtype) -> "Expression":
        part = self.part if self.part is None else self.part.to(dtype)
        return self._replace(dense=self.dense.to(dtype), part=part)


def expression_of(x) -> Expression | None:
    """The expression that an argument stands for; None where it is no held weight and nothing made of one."""
    if not isinstance(x, Tensor):
        return None
    attributes = x.__dict__
    if "expression" in attributes:
        return attributes["expression"]
    link = attributes.get("link")
    if link is None or link.dense is not x or x.ndim < 1 or link.hooked:
        return None
    link.sync()
    part = None
    if link.leaf is not None and link.leaf.requires_grad:
        part = link.leaf.movedim(0, link.axis)
    return Expression(x.detach(), part, link.rows, link.axis, (link,))


def _matrix(x) -> Expression | None:
    """The expression of an argument that is worth following: a bias's gradient is no cost."""
    e = expression_of(x)
    return None if e is None or e.dense.ndim < 2 else e


def follow(func, args, kwargs) -> Expression:
    """func(*args, **kwargs) where it is row-wise in its held weights; NotImplemented where it is not."""
    if func in _TRANSPOSES:
        func = torch.Tensor.t
    rule = _RULES.get(func)
    if rule is None or not args or "out" in kwargs or not torch.is_grad_enabled():
        return NotImplemented
    return rule(func, args, kwargs)


def _apply(e: Expression, func, args, kwargs, axis: int, factor: Tensor | None):
    with torch.no_grad():
        dense = func(e.dense, *args, **kwargs)
    part = None if e.part is None else func(e.part, *args, **kwargs)
    return Expression(dense, part, e.rows, axis, e.links, factor)


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
    """mul, div: by a number, by a factor of all rows, or row by row with another expression of the same rows."""
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
    same = (a.part is None) == (b.part is None) and a.dense.ndim == b.dense.ndim and a.axis == b.axis
    same = same and a.dense.shape[a.axis] == b.dense.shape[b.axis]
    if not same or (a.part is not None and a.rows is not b.rows and not torch.equal(a.rows, b.rows)):
        return NotImplemented
    with torch.no_grad():
        dense = func(a.dense, b.dense)
    part = None if a.part is None else func(a.part, b.part)
    return a._replace(dense=dense, part=part, links=tuple(dict.fromkeys(a.links + b.links)))


def _reduced(func, args, kwargs):
    """Over axes that are named and are not the neurons'."""
    e = _matrix(args[0])
    dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    dims = (dims,) if isinstance(dims, int) else dims
    if e is None or e.factor is not None or not dims or not all(type(d) is int for d in dims):
        return NotImplemented
    if len(args) > 2 and func.__name__ in ("std", "var"):  # whose third argument is another
        return NotImplemented
    dims = {d % e.dense.ndim for d in dims}
    if e.axis in dims:
        return NotImplemented
    keep = kwargs.get("keepdim", kwargs.get("keepdims", len(args) > 2 and args[2] is True))
    return _apply(e, func, args[1:], kwargs, e.axis if keep else e.axis - sum(d < e.axis for d in dims), None)


def _moved(func, args, kwargs):
    """transpose, t, permute, unsqueeze: where the axis went is asked of a tensor whose sizes are all different."""
    e = _matrix(args[0])
    if e is None or (func is torch.Tensor.t and e.dense.ndim != 2):
        return NotImplemented
    shape = list(range(2, 2 + e.dense.ndim))
    moved = func(torch.empty(shape, device="meta"), *args[1:], **kwargs)
    return _apply(e, func, args[1:], kwargs, list(moved.shape).index(shape[e.axis]), e.factor)


def _indexed(func, args, kwargs):
    """w[0] and w[None] in front of the neurons' axis."""
    e, index = _matrix(args[0]), args[1]
    if e is None or not (index is None or (type(index) is int and e.axis > 0)):
        return NotImplemented
    return _apply(e, func, args[1:], kwargs, e.axis + (1 if index is None else -1), e.factor)


def _reshaped(func, args, kwargs):
    """view, reshape, flatten: where the neurons' axis is and stays the first that is longer than 1."""
    e = _matrix(args[0])
    if e is None or e.dense.shape[e.axis] == 1 or any(size > 1 for size in e.dense.shape[: e.axis]):
        return NotImplemented
    if any(isinstance(a, torch.dtype) for a in (*args[1:], *kwargs.values())):
        return NotImplemented
    dense = func(e.dense, *args[1:], **kwargs)
    axis = next((i for i, size in enumerate(dense.shape) if size > 1), 0)
    if dense.shape[axis] != e.dense.shape[e.axis]:
        return NotImplemented
    part = e.part
    if part is not None:
        part = part.reshape(*dense.shape[:axis], part.shape[e.axis], *dense.shape[axis + 1 :])
    return e._replace(dense=dense, part=part, axis=axis)


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
_TRANSPOSES = {torch.Tensor.T.__get__, torch.Tensor.mT.__get__}
