"""Collecting evidence inside `with ft.scoring():`, one piece per backward pass."""

from contextlib import contextmanager

import torch

from . import distributed
from .leaves import Linked
from .scores import BufferCopy


@contextmanager
def collect(ft):
    """Makes every candidate parameter dense and trainable for the block, and takes each gradient when it is complete.

    Afterwards the selection, requires_grad, gradients and, for "movement", parameters and buffers are as before.
    """
    members = {m.parameter: (layer, m) for layer in ft.layers for m in layer.members}
    others = [p for p in [*ft.model.parameters(), *ft.parameters()] if p not in members]
    gradients = {p: p.grad for p in [*members, *others]}
    flags = {p: p.requires_grad for p in members}
    links = {p: p.link for p in members if isinstance(p, Linked)}
    for p, link in links.items():
        link.sync()
        p.__class__ = link.kind
    if links:
        distributed.rebuild_reducers(ft.model)
    buffers = None
    if ft.criterion == "movement":
        buffers = BufferCopy(ft.model)
        ft.evidence.begin_movement()
    passes = _Passes(ft)
    handles = []
    for p, (layer, member) in members.items():
        p.requires_grad_(True)
        p.grad = None
        handles.append(p.register_post_accumulate_grad_hook(passes.hook(layer, member)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if buffers is not None:
            ft.evidence.end_movement()
            buffers.restore(ft.model)
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for p, grad in gradients.items():
            p.grad = grad
        for p, link in links.items():
            p.__class__ = Linked
            link.settle()
        if links:
            distributed.rebuild_reducers(ft.model)


class _Passes:
    """Counts backward passes, and for "movement" ends each with a dense step."""

    def __init__(self, ft):
        self.ft, self.task, self.pending, self.state = ft, None, [], {}

    def hook(self, layer, member):
        def take(parameter):
            task = torch._C._current_graph_task_id()
            if task != self.task:
                self.task, self.pending = task, []
                # weights may move only when the whole pass is done: the layers still to come read them
                torch.autograd.Variable._execution_engine.queue_callback(self.finish)
            if self.ft.criterion == "movement":
                self.pending.append(parameter)
            else:
                self.ft.evidence.add([(member, parameter.grad)])
                parameter.grad = None

        return take

    def finish(self):
        self.ft.evidence.count += 1
        for parameter in self.pending:
            self.ft.dense_step(parameter, self.state.setdefault(parameter, {}))
            parameter.grad = None
