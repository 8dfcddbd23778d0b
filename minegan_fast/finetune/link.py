"""The tie between the compact leaf of the selected rows and the dense weight that they are rows of."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .neurons import compact

if TYPE_CHECKING:
    from .leaves import Rows


class Alias(torch.autograd.Function):
    generate_vmap_rule = True

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
        if grad.is_sparse:
            raise RuntimeError(
                "a weight that trains by rows was given a sparse gradient; build its nn.Embedding with sparse=False"
            )
        return compact(grad, ctx.axis, rows), None, None, None


class Link:
    """What ties a leaf to its dense weight: which rows along which axis, and who wrote last.

    Both sides may be written from outside: `load_state_dict` and EMA copies write the dense weight, weight clipping the
    leaf. Version counters tell, and for writes through `.data`, which they miss, the access itself.
    """

    def __init__(self, dense: nn.Parameter, leaf: "Rows | None", rows: Tensor | None, axis: int):
        self.dense, self.leaf, self.rows, self.axis = dense, leaf, rows, axis
        self.trainable = dense.requires_grad
        self.wanted = True  # what requires_grad_() said last
        self.kind = type(dense)
        self.dense_accessed = self.leaf_accessed = False
        self.dense_uses: set[str] = set()  # functions that took the weight whole, for the summary
        self.row_uses: set[str] = set()  # layers that compute the gradient of the rows alone
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
        return Alias.apply(self.leaf, self.dense, self.rows, self.axis)

    def traced(self) -> Tensor:
        """`alias` for torch.compile, which refuses a Function that returns a view: the same values by a copy."""
        if self.leaf is None:
            return self.plain
        if self.plain.ndim == 0:
            return self.leaf.reshape(())
        return self.plain.index_copy(self.axis, self.rows, self.leaf.movedim(0, self.axis))
