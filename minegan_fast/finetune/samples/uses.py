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

import torch
from torch import Tensor, nn

from ..._torch import PastSubclasses
from ...layers.bilinear import Linear
from ...ops._op import wide_dtype
from .trail import Trail

CHUNK_BYTES = 32 << 20  # of the per-sample gradients that exist at one time


@dataclass(eq=False)
class Use:
    """A tensor `value` with the history `trail` where it meets a batch of samples.

    batch: size of the samples' axis, 0 where it is not known that there is one. counts: whether that size tells how
    many samples a pass has. twice: it was differentiated with create_graph, so that a pass over it brings a part of the
    gradient only. shares: once the pass has come by, (begin, end) -> [end - begin, *value.shape]; squares: where that
    is cheaper, -> the sum of their squares for each row. again: the value computed anew, and its leaves by root.
    """

    trail: Trail
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
        assert self.shares is not None  # it has fired
        shares = self.shares(begin, end)
        if self.trail.scale is not None:
            return shares.reshape(end - begin, *root.shape), self.trail.scale
        if self.again is None:
            # The graph behind `value` is the pass's own, which frees it as it goes.
            with torch.enable_grad(), PastSubclasses():
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


class SampledLayer(torch.autograd.Function):
    """A linear layer or convolution whose weight, or bias, is followed: `use`, `bias_use`."""

    @staticmethod
    def forward(ctx, x, weight, bias, op, use, bias_use):
        use.trail.host.uses.add(ctx)
        ctx.found = (use,) if bias_use is None else (use, bias_use)
        ctx.op = op
        ctx.save_for_backward(x, weight)
        return op.forward(x, weight, bias)

    @staticmethod
    def backward(ctx, gy):
        x, weight = ctx.saved_tensors
        op, use, bias_use = ctx.op, ctx.found[0], ctx.found[1] if len(ctx.found) > 1 else None
        channel = op.channel % gy.dim()
        positions = [d for d in range(1, gy.dim()) if d != channel]
        wide = wide_dtype(gy.dtype)  # sums over the samples must not be rounded to half
        need, gx, gw, gb = ctx.needs_input_grad, None, None, None
        alike = x.to(gy.dtype)  # autocast makes gy of another dtype than x and the weight
        if need[0]:
            gx = op.input_gradient(gy, weight.to(gy.dtype), x.shape, alike).to(x.dtype)
        if use.takes():
            squares = None
            if isinstance(op, Linear) and x.dim() == 2 and use.trail.scale is not None:
                squares = lambda: gy.double().square().T @ x.double().square().sum(1) * use.trail.scale**2  # noqa: E731
            shares = lambda a, b: op.sample_gradients(x[a:b].to(wide), gy[a:b].to(wide), weight)  # noqa: E731
            gw = use.fire(shares, squares)
        else:
            gw = op.weight_gradient(alike, gy, weight.to(gy.dtype)).to(weight.dtype)
        if need[2] and bias_use is not None and bias_use.takes():
            gb = bias_use.fire(lambda a, b: gy[a:b].to(wide).sum(positions) if positions else gy[a:b].to(wide))
        elif need[2]:
            gb = gy.sum([0, *positions])
        return gx, gw, gb, None, None, None


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
