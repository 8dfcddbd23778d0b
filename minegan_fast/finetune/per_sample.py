"""Per-sample gradients of a batch, taken where a weight meets the samples, without a loop over these.

With x_b, dy_b the input and the output's gradient of sample b, the sample's share of the gradient of a weight W is

    linear         dW_b = dy_bᵀ x_b, summed over the positions of a sequence
    convolution    dW_b = the weight gradient of x_b, dy_b alone; all of a chunk in one call, the samples as groups
    bias, affine   the parameter is expanded along the batch, and what reaches the expanded one is the share of each

A `Use` is one such meeting, a node of the graph. The tensor that is used may be computed from parameters, its roots, by
anything that the samples take no part in; the shares are carried on to the roots by the backward of that, vectorised
over the samples (Dangel et al. 2020, arXiv 1912.10985, treat the layers; sharing and scaling of weights is added).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import layer

if TYPE_CHECKING:
    from .sampled import Trail

CHUNK_BYTES = 32 << 20  # of the per-sample gradients that exist at one time


@dataclass(eq=False)
class Use:
    """A tensor `value` with the history `trail` (sampled.py) where it meets a batch of samples.

    batch: size of the samples' axis, 0 where it is not known that there is one. counts: whether that size tells how
    many samples a pass has. twice: it was differentiated with create_graph, so that a pass over it brings a part of the
    gradient only. shares: once the pass has come by, (begin, end) -> [end - begin, *value.shape]; squares: where that
    is cheaper, -> the sum of their squares for each row. again: the value computed anew, and its leaves by root.
    """

    trail: "Trail"
    value: Tensor
    batch: int
    counts: bool
    twice: bool = False
    shares: Callable[[int, int], Tensor] | None = None
    squares: Callable[[], Tensor] | None = None
    again: tuple | None = None

    @property
    def roots(self) -> tuple[nn.Parameter, ...]:
        return self.trail.roots

    def takes(self) -> bool:
        """Whether the pass that has arrived here is evidence that this use gives sample by sample."""
        if torch.is_grad_enabled():
            self.twice = True
            return False
        return self.trail.host.exact(self)

    def fire(self, shares, squares=None) -> Tensor | None:
        """Hands the shares on; returns what stands for the gradient of the value: nothing, but DDP waits for one."""
        self.shares, self.squares = shares, squares
        self.trail.host.fired(self)
        return self.value.new_zeros(()).expand(self.value.shape) if self.trail.host.distributed else None

    def release(self):
        self.shares = self.squares = self.again = None

    def for_root(self, root: nn.Parameter, begin: int, end: int) -> tuple[Tensor, float]:
        """The samples' shares of the gradient of one root, [end - begin, *root.shape], and what to multiply them by."""
        shares = self.shares(begin, end)
        if self.trail.scale is not None:
            return shares.reshape(end - begin, *root.shape), self.trail.scale
        if self.again is None:
            # The graph behind `value` is the pass's own, which frees it as it goes.
            with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
                leaves = {id(r): r.as_subclass(Tensor).detach().requires_grad_() for r in self.roots}
                self.again = self.trail.replay(dict(leaves)), leaves
        value, leaves = self.again
        shares = shares.to(value.dtype)
        (shares,) = torch.autograd.grad(value, leaves[id(root)], shares, retain_graph=True, is_grads_batched=True)
        return shares, 1.0


class Escape(torch.autograd.Function):
    """A use that is not followed: the value itself, its gradient that of the batch."""

    @staticmethod
    def forward(ctx, value, use):
        use.trail.host.uses.add(ctx)
        ctx.found = (use,)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Expand(torch.autograd.Function):
    """[*shape] -> [batch, 1, ..., *shape[1:]] of `ndim` axes, for what is broadcast over the samples."""

    @staticmethod
    def forward(ctx, value, ndim, use):
        use.trail.host.uses.add(ctx)
        ctx.found, ctx.shape = (use,), value.shape
        return value.reshape(*[1] * (ndim - value.dim()), *value.shape).expand(use.batch, *[-1] * (ndim - 1))

    @staticmethod
    def backward(ctx, grad):
        (use,) = ctx.found
        if not use.takes():
            return grad.sum(0).reshape(ctx.shape), None, None
        return use.fire(lambda begin, end: grad[begin:end].reshape(end - begin, *ctx.shape)), None, None


@dataclass(frozen=True)
class Convolution:
    """Arguments of torch's convolution: one entry an axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def forward(self, x, w, b):
        arguments = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        return torch.convolution(x, w, b, *arguments)

    def backward(self, dy, x, w, mask):
        arguments = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        return torch.ops.aten.convolution_backward(dy, x, w, None, *arguments, [*mask, False])[:2]

    def shares(self, dy, x, w):
        B, groups = len(x), len(x) * self.groups
        x, dy = (t.reshape(1, -1, *t.shape[2:]) for t in (x, dy))
        many = w.new_empty(()).to(x.dtype).expand(B * w.shape[0], *w.shape[1:])
        arguments = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, groups)
        _, dw, _ = torch.ops.aten.convolution_backward(dy, x, many, None, *arguments, [False, True, False])
        return dw.view(B, *w.shape)


class Linear:
    """x [B, ..., in], w [out, in]."""

    @staticmethod
    def forward(x, w, b):
        return layer.Linear().forward(x, w, b)

    @staticmethod
    def backward(dy, x, w, mask):
        dw = dy.flatten(0, -2).T @ x.flatten(0, -2) if mask[1] else None
        return dy @ w if mask[0] else None, dw

    @staticmethod
    def shares(dy, x, w):
        return dy.reshape(len(x), -1, w.shape[0]).transpose(1, 2) @ x.reshape(len(x), -1, w.shape[1])


class Layer(torch.autograd.Function):
    """A linear layer or convolution whose weight, or bias, is followed: `use`, `bias_use`."""

    @staticmethod
    def forward(ctx, x, w, b, kind, use, bias_use):
        use.trail.host.uses.add(ctx)
        ctx.found = (use,) if bias_use is None else (use, bias_use)
        ctx.kind = kind
        ctx.save_for_backward(x, w)
        return kind.forward(x, w, b)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        kind, use, bias_use = ctx.kind, ctx.found[0], ctx.found[1] if len(ctx.found) > 1 else None
        axes = [0, *range(2, dy.dim())] if isinstance(kind, Convolution) else list(range(dy.dim() - 1))
        wide = torch.promote_types(dy.dtype, torch.float32)
        taken, need = use.takes(), ctx.needs_input_grad
        dx, dw = kind.backward(dy, x.to(dy.dtype), w.to(dy.dtype), [need[0], not taken])
        if taken:
            squares = None
            if kind is Linear and x.dim() == 2 and use.trail.scale is not None:
                squares = lambda: dy.double().square().T @ x.double().square().sum(1) * use.trail.scale**2  # noqa: E731
            dw = use.fire(lambda a, b: kind.shares(dy[a:b].to(wide), x[a:b].to(wide), w), squares)
        else:
            dw = dw.to(w.dtype)
        db = None
        if need[2] and bias_use is not None and bias_use.takes():
            db = bias_use.fire(lambda a, b: dy[a:b].to(wide).sum(axes[1:]) if axes[1:] else dy[a:b].to(wide))
        elif need[2]:
            db = dy.sum(axes)
        return dx if dx is None else dx.to(x.dtype), dw, db, None, None, None


def resolve(func, weight: Tensor, stride=1, padding=0, *rest) -> Convolution | None:
    """The arguments of F.conv1d, ... or F.conv_transpose1d, ... behind the bias; None where they are asymmetric."""
    transposed = "transpose" in func.__name__
    output_padding, groups, dilation = (*rest, *(0, 1, 1)[len(rest) :]) if transposed else (0, *_swap(rest))
    n = weight.dim() - 2

    def each(value):
        value = (value,) if isinstance(value, int) else tuple(value)
        return value * n if len(value) == 1 else value

    stride, dilation = each(stride), each(dilation)
    if isinstance(padding, str):
        total = [0 if padding == "valid" else d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):
            return None
        padding = tuple(t // 2 for t in total)
    return Convolution(stride, each(padding), dilation, transposed, each(output_padding), groups)


def _swap(rest):
    dilation, groups = (*rest, *(1, 1)[len(rest) :])
    return groups, dilation


def samples_of(uses: list[Use]) -> int:
    """How many samples a pass has: what axis 0 of the layers' inputs says, the smallest where they do not agree; 0
    where nothing tells."""
    sizes = {use.batch for use in uses if use.batch == 1 or (use.batch and use.counts)}
    return min(sizes - {1}, default=len(sizes))


def square_sums(evidence, member, uses: list[Use], batch: int, factor: float):
    """Adds Σ_b |Σ_uses share_b|² of a member to the evidence, and Σ_b Σ_uses share_b where it wants that too; some
    samples at a time."""
    root, squares = member.parameter, None if evidence.summed else uses[0].squares
    if len(uses) == 1 and squares is not None and member.axis == 0 and uses[0].value.shape == root.shape:
        evidence.add_squares(member, squares() * factor**2)
        return
    step = max(1, CHUNK_BYTES // (4 * root.numel()))
    for begin in range(0, batch, step):
        end = min(batch, begin + step)
        shares = [use.for_root(root, begin, end) for use in uses]
        total, largest = max(shares, key=lambda share: abs(share[1]))
        for share, scale in shares if largest else ():
            if share is not total:
                # with the largest scale outside, none of the others has to be multiplied in a pass of its own
                total = torch.add(total, share, alpha=scale / largest)
        evidence.add_samples(member, total, factor * largest)
