"""What a weight that trains by rows shows as its gradient: that of its rows, in its own shape."""

from typing import Protocol

import torch
from torch import Tensor, nn

from ..._torch import PastSubclasses, own_grad, set_own_grad
from ..neurons import compact


class Tied(Protocol):
    """A weight and the leaf of its `rows` along `axis`; None and no rows where none is selected. `Link` is it."""

    weight: nn.Parameter
    leaf: nn.Parameter | None
    rows: Tensor
    axis: int


def spread(values: Tensor, like: Tensor, axis: int, rows: Tensor) -> Tensor:
    """`values` [k, ...] as the rows of a tensor of like's shape that is zero elsewhere."""
    if like.ndim == 0:
        return values.reshape(()).clone()  # no view, as the others are none
    zeros = torch.zeros_like(like, dtype=values.dtype)
    return zeros.index_copy(axis, rows, values.movedim(0, axis))


class WholeGradient:
    """`grad` of a weight that trains by rows: the leaf's gradient in the weight's own shape, zero elsewhere.

    It exists from the moment someone reads it until the step, one that was assigned until `zero_grad`, and follows what
    backward() adds. What is written into it counts: its rows go back to the leaf before anything reads the leaf's
    gradient or adds to it. If both were written since they were equal, the whole one counts. Writes are told by
    comparing values, because a write through `.data` leaves no other trace.

    The weight may also get a gradient that no leaf knows of: from a function of another library that looks past
    `__torch_function__`, or because the weight has hooks. The rows of that gradient are added to the leaf's.
    """

    def __init__(self, link: Tied):
        self.link = link
        self.whole: Tensor | None = None
        self.known: Tensor | None = None  # the rows of both when they were equal
        self.assigned = False  # as a part of the buffer of all gradients, say, which stays what `grad` is
        self.handles = []

    @torch.no_grad()
    def settle(self):
        """Brings to the leaf what was written into the whole gradient, and what arrived at the weight itself."""
        link = self.link
        if link.leaf is None:
            return
        with PastSubclasses():
            arrived = own_grad(link.weight)
            if self.whole is not None and self.known is not None:
                rows = compact(self.whole, link.axis, link.rows)
                if not torch.equal(rows, self.known):  # NaN is unlike itself: that only copies it again
                    self._to_leaf(link.leaf, rows)
            if arrived is not None:
                set_own_grad(link.weight, None)
                arrived = arrived.to_dense() if arrived.layout != torch.strided else arrived
                old, rows = own_grad(link.leaf), compact(arrived, link.axis, link.rows).to(link.leaf.dtype)
                set_own_grad(link.leaf, rows.contiguous() if old is None else old + rows)

    def _to_leaf(self, leaf: nn.Parameter, rows: Tensor):
        self.known = rows.clone()
        old = own_grad(leaf)
        if old is not None and not old.requires_grad:
            old.copy_(rows)  # in its place: it may be a view of DDP's bucket
        else:
            set_own_grad(leaf, rows.to(leaf.device, leaf.dtype, copy=True, memory_format=torch.contiguous_format))

    def read(self) -> Tensor | None:
        """What `weight.grad` shows."""
        link = self.link
        if link.leaf is None:
            return own_grad(link.weight)
        self.settle()
        grad = own_grad(link.leaf)
        graph = grad is not None and grad.requires_grad  # after backward(create_graph=True)
        with PastSubclasses(), torch.set_grad_enabled(graph):
            if grad is None:
                self.forget()
            elif (
                self.whole is None
                or self.known is None
                or (graph and not torch.equal(grad.to(self.whole.dtype), self.known))
            ):
                whole = spread(grad.to(link.weight.dtype), link.weight.detach(), link.axis, link.rows)
                self._show(link.leaf, whole)
            else:
                rows = grad.to(self.whole.dtype)
                if not torch.equal(rows, self.known):
                    self.whole.zero_()
                    self.whole.copy_(spread(rows, self.whole, link.axis, link.rows))
                    self.known = compact(self.whole, link.axis, link.rows).clone()
        return self.whole

    def write(self, value: Tensor | None):
        """`weight.grad = value`."""
        link = self.link
        if link.leaf is None:
            return set_own_grad(link.weight, value)
        self.forget()
        set_own_grad(link.weight, None)
        set_own_grad(link.leaf, None)
        if value is None:
            return None
        if value.shape != link.weight.shape:
            raise RuntimeError(
                f"the gradient of a weight of shape {list(link.weight.shape)} cannot be one of {list(value.shape)}"
            )
        if value.layout != torch.strided:
            raise RuntimeError(
                "a weight that trains by rows was given a sparse gradient: make it dense with to_dense()"
            )
        with PastSubclasses(), torch.no_grad():
            rows = self._show(link.leaf, value)
            self.assigned = True
            self._to_leaf(link.leaf, rows)
        return None

    def _show(self, leaf: nn.Parameter, whole: Tensor) -> Tensor:
        """Begins to show `whole`; returns its rows."""
        self.whole, self.known = whole, (rows := compact(whole.detach(), self.link.axis, self.link.rows).clone())
        if not self.handles and leaf.requires_grad:  # what was written counts before another backward adds to it
            self.handles = [
                leaf.register_hook(lambda grad: self.settle()),
                leaf.register_post_accumulate_grad_hook(self._follow),
            ]
        return rows

    def _follow(self, leaf: Tensor):
        self.read()

    def end_step(self):
        """Forgets what a step has used up."""
        if not self.assigned:
            self.forget()

    def forget(self):
        self.whole, self.known, self.assigned = None, None, False
        for handle in self.handles:
            handle.remove()
        self.handles = []
