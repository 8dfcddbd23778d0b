"""Collecting evidence inside `with ft.scoring():`, sample by sample or one piece per backward pass."""

import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from ..._torch import after_pass, current_pass, own_grad, pass_reaches, set_own_grad
from ..evidence import BY_SAMPLE, Evidence, check_dense
from ..neurons import Member
from ..rows import ddp
from ..rows.freezing import Held
from ..rows.parameters import HeldWeight
from .buffers import BufferCopy
from .following import Sampled, Trail
from .uses import Use, samples_of, square_sums

PENDING_BYTES = 32 << 20  # of gradients that wait to be reduced together


@contextmanager
def collect(
    held: Held,
    evidence: Evidence,
    others: Iterable[nn.Parameter],
    dense_step: Callable[[Member, Tensor, dict], None],
    reduction: str,
    samples: int | None,
):
    """Makes every candidate parameter dense and trainable for the block, and takes each gradient when it is complete.
    What they show goes to `evidence`.

    others: parameters of the optimizer outside of the model; no gradient stays in them either. dense_step: one ordinary
        step of a whole candidate with its state, for "movement". reduction, samples: as of `SparseFinetuner.scoring`.

    Afterwards the selection, requires_grad, gradients and, for "movement", parameters and buffers are as before.
    """
    members = {m.parameter: m for layer in held.layers for m in layer.members}
    links = {p: p.link for p in members if isinstance(p, HeldWeight)}
    kinds_held = {p: type(p) for p in links}
    for p, link in links.items():
        link.sync()
        link.gradient.settle()
        p.__class__ = link.kind
    others = [p for p in [*held.model.parameters(), *others] if p not in members]
    gradients = {p: own_grad(p) for p in [*members, *others]}
    flags = {p: p.requires_grad for p in members}
    if links:
        ddp.changed(held.model)
    buffers = None
    if evidence.criterion == "movement":
        buffers = BufferCopy(held.model)
        evidence.begin_movement()
    passes = Passes(evidence, members, dense_step, reduction, samples)
    handles = []
    for p in members:
        p.requires_grad_(True)
        p.grad = None
        handles.append(p.register_post_accumulate_grad_hook(passes.take))
    kinds = passes.follow() if evidence.criterion in BY_SAMPLE and samples != 1 else {}
    try:
        yield
    finally:
        passes.close()
        for p, kind in kinds.items():
            p.__class__ = kind
            del vars(p)["trail"]
        for handle in handles:
            handle.remove()
        if buffers is not None:
            evidence.end_movement()
            buffers.restore(held.model)
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for p, grad in gradients.items():
            set_own_grad(p, grad)
        for p, link in links.items():
            p.__class__ = kinds_held[p]
            link.settle()
        if links:
            ddp.changed(held.model)
    if passes.by_batch:
        names = ", ".join(sorted(passes.by_batch))
        warnings.warn(
            f"scored by the gradient of a whole batch, not sample by sample: {names}. They are used in ways that are "
            "not followed; with one sample in each backward() and scoring(samples=1) all are exact",
            stacklevel=5,
        )


class Passes:
    """The backward passes of a block.

    It gathers gradients until they are worth a call, counts the pieces of evidence, and for "movement" ends each pass
    with a dense step.

    uses: nodes of living graphs where a followed parameter meets samples. waiting: {parameter: its uses in this pass
    whose shares of the samples have arrived}, expected: how many will.
    """

    def __init__(self, evidence, members, dense_step, reduction, samples):
        self.evidence, self.members, self.dense_step = evidence, members, dense_step
        self.reduction, self.samples = reduction, samples
        self.task, self.closed, self.pending, self.bytes, self.state = None, False, [], 0, {}
        self.uses: weakref.WeakSet = weakref.WeakSet()
        self.sinks: dict[nn.Parameter, Node] = {}
        self.by_batch: set[str] = set()
        self.distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._forget()

    def _forget(self):
        self.batch, self.factor, self.unknown, self.taken = 1, 1.0, False, set()
        self.waiting: dict[nn.Parameter, list[Use]] = {}
        self.expected: dict[nn.Parameter, int] = {}

    def follow(self) -> dict[nn.Parameter, type]:
        """Makes the plain parameters ones that are followed; their classes so far."""
        kinds = {p: type(p) for p in self.members if type(p) is nn.Parameter}
        for p in kinds:
            self.sinks[p] = get_gradient_edge(p).node
            p.__class__ = Sampled
            vars(p)["trail"] = Trail((p,), self, 1.0)
        return kinds

    def exact(self, use: Use) -> bool:
        """Whether the pass under way takes its evidence from this use, sample by sample."""
        if self.closed or not all(map(self._accumulates, use.roots)):
            return False
        self._begin()
        return use in self.taken

    def _accumulates(self, root: nn.Parameter) -> bool:
        """Whether the pass under way brings this parameter a gradient: torch.autograd.grad() does not."""
        return pass_reaches(self.sinks[root], unknown=False)

    def _begin(self):
        task = current_pass()
        if task == self.task:
            return
        self._forget()
        self.task, self.pending, self.bytes = task, [], 0
        self.before = self.evidence.snapshot()
        # Weights may move only when the whole pass is done, because layers still to come read them.
        after_pass(self._finish)
        nodes = [node for node in self.uses if pass_reaches(node, unknown=False)]
        found = [use for node in nodes for use in node.found]
        if self.evidence.criterion in BY_SAMPLE:
            told = self.samples or samples_of(found)
            self.unknown, self.batch = told == 0, max(told, 1)
            self.factor = self.batch if self.reduction == "mean" else 1.0
        taken = {use for use in found if use.batch == self.batch > 1 and not use.twice}
        taken = {use for use in taken if all(map(self._accumulates, use.roots)) and not use.trail.outdated()}
        # The shares of all uses of a parameter add up before they are squared. So if one use yields no shares, none of
        # its uses can be taken, and a use that is not taken spoils the other parameters that it depends on in turn.
        while True:
            spoilt = {root for use in found if use not in taken for root in use.roots}
            kept = {use for use in taken if spoilt.isdisjoint(use.roots)}
            if kept == taken:
                break
            taken = kept
        self.taken = taken
        for use in taken:
            for root in use.roots:
                self.waiting[root] = []
                self.expected[root] = self.expected.get(root, 0) + 1

    def fired(self, use: Use):
        """The shares of a use have arrived."""
        for root in use.roots:
            self.waiting[root].append(use)
        for root in use.roots:
            if len(self.waiting[root]) == self.expected[root]:
                uses = self.waiting.pop(root)
                square_sums(self.evidence, self.members[root], uses, self.batch, self.factor)
                for done in uses:
                    if self.waiting.keys().isdisjoint(done.roots):
                        done.release()

    @torch.no_grad()
    def take(self, parameter: nn.Parameter):
        """A parameter's gradient is complete."""
        self._begin()
        if self.evidence.criterion == "movement":
            self.pending.append((self.members[parameter], parameter.grad))
            return
        grad, parameter.grad = parameter.grad, None
        if grad is None or (parameter in self.expected and self.distributed):
            return  # its samples' shares were taken; under DDP zeros arrive
        member = self.members[parameter]
        if self.batch > 1 or self.unknown:
            self.by_batch.add(member.name)
        self.pending.append((member, grad))
        self.bytes += grad.nbytes if grad.layout == torch.strided else 0
        if self.bytes >= PENDING_BYTES:
            self._flush()

    def _flush(self):
        self.evidence.add(self.pending, self.factor)
        self.pending, self.bytes = [], 0

    def _finish(self):
        if self.evidence.criterion == "movement":
            check_dense(self.pending)
            for member, grad in self.pending:
                self.dense_step(member, grad, self.state.setdefault(member.parameter, {}))
                member.parameter.grad = None
        else:
            self._flush()
        self.evidence.count += self.batch
        self.evidence.by_batch |= self.by_batch
        self.task, self.pending, self.before = None, [], None
        self._forget()

    def close(self):
        """Takes back what a pass that failed has added."""
        self.closed = True
        if self.task is not None:
            self.evidence.restore(self.before)
