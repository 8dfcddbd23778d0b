"""What the package relies on of the private names of torch's DistributedDataParallel."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minegan_fast import _torch


class Two(nn.Module):
    """Its parameters; `ddp` is the wrapper that was active in its forward, `redirect` is called there."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        self.redirect = None

    def forward(self, x: Tensor) -> Tensor:
        self.ddp = _torch.active_ddp()
        if self.redirect is not None:
            self.redirect()
        return (x * self.a + (0 if self.b is None else self.b)).sum()


def test_the_active_ddp(group_of_one):
    net = Two()
    ddp = DistributedDataParallel(net)
    ddp(torch.ones(2))
    assert net.ddp is ddp
    assert _torch.active_ddp() is None


def counting(seen: list):
    """A communication hook that notes the size of each bucket and doubles it."""

    def hook(state, bucket):
        seen.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer() * 2)
        return future

    return hook


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("begun", [False, True], ids=["at first", "after a step"])
@pytest.mark.parametrize("within", [False, True], ids=["between forwards", "within a forward"])
def test_ddp_reduces_what_it_is_told(group_of_one, static, within, begun):
    """One parameter of its two: the other would otherwise be waited for, or reduced."""
    net, seen = Two(), []
    ddp = DistributedDataParallel(net, static_graph=static)
    ddp.register_comm_hook(None, counting(seen))
    if begun:
        ddp(torch.full((2,), 3.0)).backward()
        net.a.grad, net.b.grad = None, None
        seen.clear()
    if within:
        net.redirect = lambda: _torch.reduce_these(ddp, [("a", net.a)])
    else:
        _torch.reduce_these(ddp, [("a", net.a)])
    for step in (1, 2):
        ddp(torch.full((2,), 3.0)).backward()
        assert seen == [2] * step
        assert net.a.grad.tolist() == [6.0, 6.0], "by the hook"
        assert net.b.grad.tolist() == [1.0, 1.0], "not reduced"
        net.redirect = net.a.grad = net.b.grad = None


def test_ddp_reduces_a_tensor_that_is_no_parameter_of_its_module(group_of_one):
    net, seen = Two(), []
    ddp = DistributedDataParallel(net)
    ddp.register_comm_hook(None, counting(seen))
    leaf = nn.Parameter(torch.ones(3))
    net.forward = lambda x: (leaf * x.sum()).sum()
    _torch.reduce_these(ddp, [("leaf", leaf)])
    ddp(torch.ones(2)).backward()
    assert seen == [3]
    assert leaf.grad.tolist() == [4.0] * 3
