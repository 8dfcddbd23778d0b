"""How a weight is followed from its parameter to where it meets the samples, while batches are scored by sample.

During `with ft.scoring():` the candidates are `Sampled` parameters, and what is computed from them alone is `Derived`.
Where one of either meets other data in a linear layer, a convolution, a sum or product broadcast over the samples, a
normalisation's affine, bias_act or noise_bias_act, the meeting becomes a `Use` (uses.py). In every other function
it is an `Escape`: its parameters' gradient is then that of the batch. Axis 0 of the other data is the samples' axis.
"""

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._torch import PastSubclasses, version_of
from ...layers.bilinear import Linear, functions_of
from ...ops import bias_act, noise_bias_act
from ..rows.containers import map_tensors, tensors_in
from ..rows.parameters import VIEWS
from .trail import Followed, Trail, is_followed, is_foreign
from .uses import Escape, Expand, SampledLayer, Use


class _Following(Followed):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the compiler's graph is no place to look into: its weights escape
            with PastSubclasses():
                return func(*args, **kwargs)
        with PastSubclasses():
            accessor = getattr(func, "__name__", "") in ("__get__", "__set__") and func.__self__ not in VIEWS
            if accessor or not torch.is_grad_enabled() or func in _AS_IT_IS:
                return func(*args, **kwargs)
            if (layer := _LAYERS.get(func)) is not None:
                result = layer(*args, **kwargs)
            else:
                rule = _RULES.get(func)
                result = NotImplemented if rule is None else rule(func, *args, **kwargs)
            return _other(func, args, kwargs) if result is NotImplemented else result


class Sampled(_Following, nn.Parameter):
    """A parameter that is scored; a copy or a pickle of it is a plain one."""

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), nn.Parameter(self.detach().clone(), self.requires_grad))

    def __reduce_ex__(self, protocol):
        return nn.Parameter(self.detach()).__reduce_ex__(protocol)


class Derived(_Following, Tensor):
    """What was computed from parameters and constants."""


_AS_IT_IS = {
    torch.autograd.grad,
    torch.autograd.backward,
    Tensor.backward,
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
    Tensor.requires_grad_,
    Tensor.detach,
}


def _derived(func, args, kwargs=None, scale=None):
    """Calls a function of followed tensors and constants, and follows what is differentiable in the result."""
    kwargs = kwargs or {}
    result = func(*args, **kwargs)
    tensors = [*tensors_in(args), *tensors_in(kwargs)]
    sources = [t for t in tensors if is_followed(t)]
    constants = tuple((t, version_of(t)) for t in tensors if is_foreign(t))
    roots = tuple({id(root): root for t in sources for root in t.trail.roots}.values())

    def follow(x, which):
        if not isinstance(x, Tensor) or is_followed(x) or not x.requires_grad:
            return x
        x = x.as_subclass(Derived)
        x.trail = Trail(roots, sources[0].trail.host, scale, (func, args, kwargs, which), constants, version_of(x))
        return x

    if isinstance(result, list | tuple) and not hasattr(result, "_fields"):
        return type(result)(follow(x, i) for i, x in enumerate(result))
    return follow(result, None)


def _written(t) -> bool:
    """Whether it was changed in place since: its trail does not know."""
    return t.trail.call is not None and version_of(t) != t.trail.version


def _use(t, batch: int, counts: bool = False) -> Use:
    return Use(t.trail, t.as_subclass(Tensor), 0 if _written(t) else batch, counts)


def _escape(t, batch: int = 0, counts: bool = False):
    if not (is_followed(t) and t.requires_grad):
        return t
    use = _use(t, batch, counts)
    return Escape.apply(use.value, use)


def _other(func, args, kwargs):
    """Any function: of followed tensors alone its result is followed on, else they escape into it."""
    tensors = [*tensors_in(args), *tensors_in(kwargs)]
    foreign = [t for t in tensors if is_foreign(t)]
    constant = not foreign or (func in _OF_CONSTANTS and not any(t.requires_grad for t in foreign))
    if constant and func not in _RANDOM and not any(_written(t) for t in tensors if is_followed(t)):
        return _derived(func, args, kwargs, args[0].trail.scale if _reshapes(func, args) else None)
    return func(*map_tensors(_escape, args), **map_tensors(_escape, kwargs))


def _reshapes(func, args) -> bool:
    """Whether the result has the elements of the first argument, in their order."""
    if not args or not is_followed(args[0]):
        return False
    if func is Tensor.__getitem__:
        return isinstance(args[1], int) and len(args[0]) == 1
    return func in _RESHAPING and not any(isinstance(x, torch.dtype) for x in args)


_RESHAPING = {getattr(Tensor, n) for n in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")}
_RESHAPING |= {torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze}


# They give something else at every call, so that a weight that they made cannot be made again.
_RANDOM = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu}
_RANDOM |= {torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.rrelu, F.gumbel_softmax}

# With vectors that are no data, as spectral norm's: a product of a matrix and a vector has no samples in it.
_OF_CONSTANTS = {torch.mv, torch.dot, torch.vdot, Tensor.mv, Tensor.dot, Tensor.vdot}


def _broadcast(t, ndim: int, batch: int):
    """t as every sample sees it, [batch, ...]; None where t has an axis of samples itself."""
    if t.dim() == ndim and t.shape[:1] != (1,):
        return None
    if batch < 2 or _written(t):
        return _escape(t, batch)
    use = _use(t, batch)
    return Expand.apply(use.value, ndim, use)


def _elementwise(func, a, b, *rest, **kwargs):
    t, number = (a, b) if isinstance(a, Tensor) else (b, a)
    if not isinstance(number, Tensor):
        if not is_followed(t) or _written(t):
            return NotImplemented
        scale = t.trail.scale if func in _SCALES and not (rest or kwargs) else None
        if scale is not None and func in _DIVIDES:
            scale = scale / number if t is a and number else None
        elif scale is not None:
            scale = scale * number
        return _derived(func, (a, b, *rest), kwargs, scale)
    t, x = (a, b) if is_followed(a) else (b, a)
    if not is_foreign(x) or not t.requires_grad or _written(t):
        return NotImplemented
    shape = torch.broadcast_shapes(a.shape, b.shape)
    if not x.requires_grad and (shape == t.shape or shape[0] == 1):  # a constant
        return _derived(func, (a, b, *rest), kwargs)
    # Without a gradient and with few axes x may be no data but a table, of positions say.
    data = x.dim() > 1 and (x.requires_grad or x.dim() > 3)
    if not data or x.dim() != len(shape) or x.shape[0] != shape[0]:
        return NotImplemented
    every = _broadcast(t, len(shape), shape[0])
    if every is None:
        return NotImplemented
    return func(every, b, *rest, **kwargs) if t is a else func(a, every, *rest, **kwargs)


_SCALES = {getattr(Tensor, n) for n in ("mul", "multiply", "__mul__", "__rmul__", "div", "true_divide", "__truediv__")}
_SCALES |= {torch.mul, torch.multiply, torch.div, torch.true_divide}
_DIVIDES = {Tensor.div, Tensor.true_divide, Tensor.__truediv__, torch.div, torch.true_divide}
_SUMS = {getattr(Tensor, n) for n in ("add", "sub", "__add__", "__radd__", "__sub__", "__rsub__", "__rtruediv__")}
_SUMS |= {getattr(Tensor, n) for n in ("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__")}
_SUMS |= {torch.add, torch.sub, torch.subtract, torch.rsub}


def _embedding(func, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, *flags, **names):
    """Of one label per sample: a linear layer of the labels' unit vectors."""
    if input.dim() != 1 or not is_followed(weight) or padding_idx is not None or max_norm is not None:
        return NotImplemented
    if any(flags) or any(names.values()) or _written(weight):
        return NotImplemented
    units = F.one_hot(input.long(), len(weight)).to(weight.dtype)
    call = _layer(units, _derived(Tensor.t, (weight,)), None, 2)
    return call if call is NotImplemented else call(Linear(), units)


def _layer(x, weight, bias, ndim):
    batched = x.dim() >= 2 if ndim == 2 else x.dim() == ndim
    if not batched or is_followed(x) or not (is_followed(weight) and weight.requires_grad) or _written(weight):
        return NotImplemented
    if len(x) < 2 or any(is_foreign(t) and t.requires_grad for t in (weight, bias)):
        return lambda op, x: op.as_torch(x, _escape(weight, len(x), True), _escape(bias, len(x)))
    use = _use(weight, len(x), True)
    bias_use = _use(bias, len(x)) if is_followed(bias) and bias.requires_grad else None
    value = bias if bias_use is None else bias_use.value
    return lambda op, x: SampledLayer.apply(x, use.value, value, op, use, bias_use)


def _bias_act(func, x, b=None, *, dim=1, **kwargs):
    if is_followed(x) or not is_followed(b) or not b.requires_grad or dim % x.dim() == 0:
        return NotImplemented
    shape = [-1 if d == dim % x.dim() else 1 for d in range(x.dim())]
    every = _broadcast(_derived(lambda b: b.to(x.dtype).view(shape), (b,)), x.dim(), len(x))
    return bias_act(x + every, None, dim=dim, **kwargs)


def _noise_bias_act(func, c, d=None, noise=None, strength=None, bias=None, **kwargs):
    if any(map(is_followed, (c, d, noise))):
        return NotImplemented
    every = [
        _broadcast(_derived(Tensor.view, (t, (1, -1))), 2, len(c)) if is_followed(t) and t.requires_grad else t
        for t in (strength, bias)
    ]
    return func(c, d, noise, *every, **kwargs)


def _normalisation(func, *args, **kwargs):
    given = inspect.signature(func).bind(*args, **kwargs)
    given.apply_defaults()
    given = given.arguments
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if is_followed(x) or x.dim() < 2 or (func is F.batch_norm and given["training"]):
        return NotImplemented  # a batch's statistics tie the samples together
    y = func(**given | {"weight": None, "bias": None})
    for t, together in ((weight, torch.mul), (bias, torch.add)):
        if t is not None:
            shape = t.shape if func is F.layer_norm else (-1, *[1] * (x.dim() - 2))
            if is_followed(t) and t.requires_grad:
                t = _broadcast(_derived(Tensor.view, (t, shape)), x.dim(), len(x))
                if t is None:
                    return NotImplemented
            else:
                t = t.view(shape)
            y = together(y, t.to(y.dtype))
    return y


def _expand(func, t, *sizes):
    if not (is_followed(t) and t.requires_grad) or _written(t):
        return NotImplemented
    sizes = sizes[0].shape if func is Tensor.expand_as else sizes[0] if isinstance(sizes[0], list | tuple) else sizes
    own = t.shape[0] if t.dim() == len(sizes) else 1
    if len(sizes) == 0 or own != 1 or sizes[0] in (-1, 1):
        return NotImplemented
    every = _broadcast(t, len(sizes), sizes[0])
    return NotImplemented if every is None else every.expand(sizes)


_RULES = dict.fromkeys(_SCALES | _SUMS, _elementwise)
_RULES |= {bias_act: _bias_act, noise_bias_act: _noise_bias_act, F.embedding: _embedding}
_RULES |= {Tensor.expand: _expand, Tensor.expand_as: _expand}
_RULES |= dict.fromkeys((F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm), _normalisation)
_LAYERS = functions_of(_layer)
