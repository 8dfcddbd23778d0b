"""What ties the leaf of the selected rows to the weight that they are rows of."""

import weakref

import torch
from torch import Tensor, nn

from ..._torch import (
    PastSubclasses,
    apply_function,
    has_gradient_hooks,
    own_data,
    own_grad,
    set_own_data,
    set_own_grad,
    version_of,
)
from ...ops import write_rows
from ..neurons import compact
from .gradient import WholeGradient, spread


class Alias(torch.autograd.Function):
    """Returns the weight itself. Its backward hands the selected rows of the gradient to the leaf."""

    generate_vmap_rule = True

    @staticmethod
    def forward(leaf, weight, rows, axis, links, use):
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        leaf, _, rows, ctx.axis, ctx.links, ctx.use = inputs
        ctx.dtype = leaf.dtype
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        if grad.is_sparse:
            raise RuntimeError(
                "a weight that trains by rows was given a sparse gradient; build its nn.Embedding with sparse=False"
            )
        for link in ctx.links:
            link.dense_uses.add(ctx.use)
        return compact(grad, ctx.axis, rows).to(ctx.dtype), None, None, None, None, None


class OwnGradient(torch.autograd.Function):
    """Returns the weight itself, and leaves it a gradient of its own: in whole shape, zero where no row is selected.
    Hooks on the weight see that gradient, and `WholeGradient` hands its rows to the leaf."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, rows, axis):
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, rows, ctx.axis = inputs
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return spread(compact(grad, ctx.axis, rows), grad, ctx.axis, rows), None, None


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows train. Half precision would round small steps away, so it is float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Ledger:
    """The version counters that leaves and weights had when they were last equal.

    All links of an optimizer share one ledger, so that a step compares and renews it as a whole.
    """

    def __init__(self, links: list["Link"]):
        self.links = links
        self.tensors = [t for link in links for t in (link.leaf, link.weight) if t is not None]
        self.versions = [0] * len(self.tensors)
        self.accesses = -1

    def read(self) -> list[int]:
        with PastSubclasses():
            return [version_of(t) for t in self.tensors]

    def sync(self) -> bool:
        """`Link.sync` of all links. True where anything may have been written or moved since the last step."""
        if self.accesses == Link.accesses and self.versions == self.read():
            return False
        for link in self.links:
            link.sync()
        return True

    def settle(self):
        """Declares all leaves and weights equal: a step has written both."""
        self.versions = self.read()
        self.accesses = -1 if any(link.lent for link in self.links) else Link.accesses

    @classmethod
    def join(cls, links: list["Link"]) -> "Ledger":
        """One ledger for these links, which have just been synced."""
        ledger = cls(links)
        for i, link in enumerate(links):
            link.ledger, link.index = ledger, i
        ledger.settle()
        return ledger


class Link:
    """What ties a leaf to its weight: which rows along which axis, and who wrote last.

    Both sides may be written from outside: `load_state_dict` and copies of an EMA write the weight, weight clipping
    writes the leaf. Version counters tell which. They miss writes through `.data`, so an access to it counts as a
    suspicion, and so does what it gave for as long as that lives: the values decide.

    The leaf of a half-precision weight is float32. The two are equal where the leaf rounds to the weight. Where no row
    trains there is no leaf, and `rows` is empty.
    """

    epoch = 0  # how often weights were held or given back
    accesses = 0  # to `.data` of any leaf or held weight; a Ledger that has seen this count can skip asking every link

    def __init__(self, weight: nn.Parameter, leaf: nn.Parameter | None, rows: Tensor | None, axis: int):
        self.weight, self.leaf, self.axis = weight, leaf, axis
        self.rows = weight.new_empty(0, dtype=torch.int64) if rows is None else rows
        self.wanted = True  # what requires_grad_() said last
        self.kind: type = type(weight)
        self.guessed = False  # the axis: nothing told where the neurons of a square matrix are
        self.places: list[tuple[dict, str]] = []  # the modules' dictionaries that list the weight, and as what
        self.gradient = WholeGradient(self)
        self.dense_uses: set[str] = set()  # through which functions a gradient of all rows came, for the summary
        self.row_uses: set[str] = set()  # layers that compute the gradient of the rows alone
        self.ledger, self.index = Ledger([self]), 0
        # What `lend` gave, until it is dead at a look: (tensor, whether it is the leaf's).
        self.lent: dict[int, tuple[weakref.ref | None, bool]] = {}
        self.plain = weight.data  # for the compiler, which cannot see past the subclass
        self.masters: Tensor | None = None  # of half precision: the leaf before writes from outside
        self.masters_left = -1  # the leaf's version counter after these writes
        self.settle()

    def settle(self):
        """Declares leaf and weight equal."""
        self.weight_accessed = self.leaf_accessed = False
        if self.lent:
            self.lent = {key: x for key, x in self.lent.items() if x[0] is None or x[0]() is not None}
        if self.leaf is not None:
            with PastSubclasses():
                self.ledger.versions[2 * self.index : 2 * self.index + 2] = (
                    version_of(self.leaf),
                    version_of(self.weight),
                )

    def access(self, weight: bool = False, leaf: bool = False):
        """Notes that someone may write to one of the two past its version counter."""
        Link.accesses += 1
        self.weight_accessed |= weight
        self.leaf_accessed |= leaf

    def lend(self, data: Tensor, leaf: bool = False) -> Tensor:
        """Gives `data`, a tensor of the weight's memory or the leaf's with a version counter of its own, to others."""
        self.access(weight=not leaf, leaf=leaf)
        if self.leaf is not None:
            ref = weakref.ref(data, Link.note_end)
            self.lent[id(ref)] = ref, leaf
        return data

    @staticmethod
    def note_end(ref: weakref.ref):
        """It may have been written at last: steps look once more."""
        Link.accesses += 1

    def sync(self):
        """Makes leaf and weight equal after writes from outside; where both were written, the weight counts."""
        if self.leaf is None:
            return
        leaf_known, weight_known = self.ledger.versions[2 * self.index : 2 * self.index + 2]
        with PastSubclasses():
            leaf_changed, weight_changed = version_of(self.leaf) != leaf_known, version_of(self.weight) != weight_known
        if weight_changed or leaf_changed or self.weight_accessed or self.leaf_accessed or self.lent:  # seldom
            self._reconcile(self.leaf, weight_changed, leaf_changed)

    @torch.no_grad()
    def _reconcile(self, leaf: nn.Parameter, weight_changed: bool, leaf_changed: bool):
        Link.accesses += 1  # what was written may lie elsewhere now, as after set_(): the next step looks
        with PastSubclasses():
            current = compact(self.weight, self.axis, self.rows)
            if current.device != leaf.device or master_dtype(current.dtype) != leaf.dtype:
                return  # module.to() has converted one and comes to the other
            equal = current == leaf.to(current.dtype)
            if not equal.all():
                # A version is proof of a write, an access to .data a suspicion, and an old one the last.
                lent = any(not of_leaf for _, of_leaf in self.lent.values())
                suspected = self.weight_accessed or (lent and not self.leaf_accessed)
                if weight_changed or (suspected and not leaf_changed):
                    self._take(leaf, current, equal)
                else:
                    self.write()
        self.settle()

    def _take(self, leaf: nn.Parameter, current: Tensor, equal: Tensor):
        """The leaf gets the weight's rows where they differ. Where a half-precision weight comes back to what it was,
        as when an average is swapped in and out, the leaf does too: it has more digits than the weight."""
        values = current.to(leaf.dtype)
        if current.dtype != leaf.dtype:
            if self.masters is None or self.masters_left != version_of(leaf):  # the leaf has trained since
                self.masters = leaf.clone()
            values = torch.where(self.masters.to(current.dtype) == current, self.masters, values)
        leaf.copy_(torch.where(equal, leaf, values))
        self.masters_left = version_of(leaf)

    @torch.no_grad()
    def write(self):
        """Writes the leaf through to the weight."""
        if self.leaf is None:
            return
        with PastSubclasses():
            write_rows(self.weight, self.axis, self.rows, self.leaf)
        self.settle()

    @torch.no_grad()
    def set_weight(self, value: Tensor):
        """`weight.data = value`, as `model.half()`, `double()` and `to()` call it: the leaf and its gradient follow. A
        mere change of dtype leaves the leaf what counts: half precision rounds the weight alone."""
        self.sync()
        for key in [key for key, (_, of_leaf) in self.lent.items() if not of_leaf]:  # other memory from now on
            del self.lent[key]
        self.lend(value)
        if value.untyped_storage().nbytes() > value.nbytes:  # a part of a buffer, through which someone may write
            self.lent[0] = None, False
        self.gradient.settle()
        plain = own_data(self.weight)
        converted = self.leaf is not None and value.dtype != plain.dtype and value.shape == plain.shape
        if converted:
            now, then = (compact(t, self.axis, self.rows.to(t.device)) for t in (value, plain))
            converted = torch.equal(now, then.to(now.device, now.dtype))
        set_own_data(self.weight, value)
        self.plain = own_data(self.weight)
        if self.leaf is None:
            return
        self.rows = self.rows.to(value.device)
        self._move(self.leaf, value.device, master_dtype(value.dtype))
        if converted:
            self.write()
            self.access(weight=True)

    @staticmethod
    def _move(leaf: nn.Parameter, device: torch.device, dtype: torch.dtype):
        data = own_data(leaf)
        if data.device == device and data.dtype == dtype:
            return
        grad = own_grad(leaf)
        set_own_grad(leaf, None)
        set_own_data(leaf, data.to(device, dtype))
        if grad is not None:
            set_own_grad(leaf, grad.to(device, dtype))

    def in_place(self) -> bool:
        """Whether the modules still hold the weight, and it is still this one: swapping exchanges what tensors are."""
        weight = self.weight
        for parameters, name in self.places:
            if parameters.get(name) is not weight:
                return False
        return weight.__dict__.get("link") is self

    def replacement(self) -> nn.Parameter | None:
        """The parameter that the modules hold in the weight's place, as after `load_state_dict(assign=True)`; None
        where that is the weight. RuntimeError where it is none that fits."""
        if self.in_place():
            return None
        found = {id(d.get(n)): d.get(n) for d, n in self.places}
        (new, *others) = found.values()
        fits = not others and type(new) is nn.Parameter and new.shape == self.weight.shape
        if new is None or not fits or self.weight.__dict__.get("link") is not self or not new.is_floating_point():
            raise RuntimeError(
                f"{self.places[0][1]!r} of shape {list(self.weight.shape)} was replaced by another parameter while its "
                "rows train (an assignment, swapped parameters, a parametrization, pruning, fully_shard): write into "
                "the weight instead, or release() the model first and build a new SparseFinetuner on what it has become"
            )
        return new

    def reclaim(self):
        """Takes values and gradient of the `replacement` over, and puts the weight back."""
        new = self.replacement()
        if new is None:
            return
        self.set_weight(new.data)
        if new.grad is not None:
            self.gradient.write(new.grad)
        for d, n in self.places:
            d[n] = self.weight

    @torch.no_grad()
    def set_leaf(self, value: Tensor):
        """`leaf.data = value`. The rounding of the leaf to half precision moves it, and does not round it."""
        if self.leaf is None:
            return
        self.sync()
        plain, dtype = own_data(self.leaf), master_dtype(value.dtype)
        if dtype != value.dtype:
            kept = plain.to(value.device)
            same = value.shape == kept.shape and torch.equal(kept.to(value.dtype), value)
            value = (kept if same else value).to(dtype)
        set_own_data(self.leaf, self.lend(value, leaf=True))

    @property
    def hooked(self) -> bool:
        """Whether someone waits for the weight's own gradient."""
        return self.leaf is not None and has_gradient_hooks(self.weight)

    def alias(self) -> Tensor:
        """The weight as a differentiable computation sees it."""
        if self.leaf is None or not self.leaf.requires_grad or not torch.is_grad_enabled():
            return self.weight
        if self.hooked:
            return apply_function(OwnGradient, self.weight, self.rows, self.axis)
        return apply_function(Alias, self.leaf, self.weight, self.rows, self.axis, (), "")

    def traced(self) -> Tensor:
        """`alias` for torch.compile, which refuses a Function that returns a view: the same values by a copy."""
        if self.leaf is None:
            return self.plain
        leaf = self.leaf.to(self.plain.dtype)
        if self.plain.ndim == 0:
            return leaf.reshape(())
        return self.plain.index_copy(self.axis, self.rows, leaf.movedim(0, self.axis))
