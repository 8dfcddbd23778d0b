"""What each of two processes does for test_distributed.py."""

import contextlib
import copy
import gc
import os
import sys

import pytest
import torch
import torch.distributed as dist
from sample_networks import build, data
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from minegan_fast.finetune import SparseFinetuner
from minegan_fast.ops import modulated_conv2d

ARGUMENTS = {"lr": 1e-2, "density": 0.3, "betas": (0.5, 0.9), "ema_decay": 0.9}


def step(model, ft, x, parts=1):
    """One step on the samples x, in `parts` accumulated pieces, of which only the last talks to the other rank."""
    ft.zero_grad()
    for i, piece in enumerate(x.chunk(parts)):
        with (
            model.no_sync()
            if isinstance(model, DistributedDataParallel) and i < parts - 1
            else contextlib.nullcontext()
        ):
            (model(piece).square().mean() / parts).backward()
    ft.step()


def mine(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def same_everywhere(tensors):
    for t in tensors:
        both = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(both, t.detach().contiguous())
        assert torch.equal(both[0], both[1])


def ddp_before_the_selection(wrapped: bool):
    """The drop-in loop of a script that wraps first: dense gradients score, then DDP reduces the compact ones."""
    net = build("mlp")
    model = DistributedDataParallel(net)
    ft = SparseFinetuner(model if wrapped else net, score_steps=2, **ARGUMENTS)
    for i in range(5):
        step(model, ft, mine(data(4, seed=i)), parts=1 + (i == 4))
        if i > 1:
            same_everywhere([p.grad for p in ft.parameters()])
    same_everywhere(net.parameters())
    ft.verify()
    result = copy.deepcopy(net.state_dict()), ft.selection.rows, ft.scores()
    with ft.scoring():  # and once more: evidence after a selection, through DDP, and other neurons
        model(-3 * mine(data(4, seed=11))).square().mean().backward()
    ft.select({"1.weight": [0], "3.weight": [0, 1]} if wrapped else None)
    for i in range(2):
        step(model, ft, mine(data(4, seed=20 + i)))
        same_everywhere([p.grad for p in ft.parameters()])
    same_everywhere(net.parameters())
    ft.verify()
    ft.release()
    model(mine(data(4))).square().mean().backward()
    same_everywhere([p.grad for p in net.parameters()])
    return result


def accumulation():
    """Backward passes inside no_sync() send nothing, the one after them the compact rows, and a hook that was given
    to DDP before the selection sees it."""
    net = build("mlp")
    model, sent = DistributedDataParallel(net), []

    def hook(group, bucket):
        sent.append(bucket.buffer().numel())
        return allreduce_hook(group, bucket)

    model.register_comm_hook(None, hook)
    ft = SparseFinetuner(model, score_steps=2, **ARGUMENTS)
    for i in range(4):
        trained = sum(p.numel() for p in ft.parameters())
        step(model, ft, mine(data(12, seed=i)), parts=3)
        assert sum(sent) == trained
        sent.clear()
    assert trained < sum(p.numel() for p in net.parameters()) / 2
    same_everywhere([*net.parameters(), *(p.grad for p in ft.parameters())])
    ft.verify()
    return net.state_dict(), ft.selection.rows, ft.scores()


def ddp_after_the_selection(folder: str):
    net = build("mlp")
    ft = SparseFinetuner(net, **ARGUMENTS)
    with ft.scoring():
        for x in mine(data(4, seed=3)).split(1):
            net(x).square().mean().backward()
    ft.select()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    for i in range(3):
        if i == 2 and dist.get_rank() == 0:
            torch.save((net.state_dict(), ft.state_dict()), f"{folder}/two.pt")
        step(model, ft, mine(data(4, seed=i)))
        same_everywhere([p.grad for p in ft.parameters()])
    same_everywhere(net.parameters())
    ft.verify()
    return net.state_dict(), ft.selection.rows, ft.scores()


def begun_by_one(folder: str):
    """The last step of `ddp_after_the_selection` in a run that one process began."""
    net = build("mlp")
    ft = SparseFinetuner(net, **ARGUMENTS)
    state, optimizer = torch.load(f"{folder}/one.pt", weights_only=True)
    net.load_state_dict(state)
    ft.load_state_dict(optimizer)
    step(DistributedDataParallel(net), ft, mine(data(4, seed=2)))
    ft.verify()
    return net.state_dict(), ft.selection.rows, ft.scores()


class Modulated(nn.Module):
    """Its only weight is that of an op, which asks it without a call of torch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3, dtype=torch.float64))

    def forward(self, x):
        return modulated_conv2d(x, self.weight, 1 + x.mean((2, 3)))


def ddp_around_a_weight_of_an_op():
    net = Modulated()
    model = DistributedDataParallel(net)
    ft = SparseFinetuner(net, **ARGUMENTS)
    ft.select({"weight": [1, 4]})
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step(model, ft, mine(x))
    same_everywhere([p.grad for p in ft.parameters()])
    same_everywhere(net.parameters())


def without_ddp():
    """A process group given to the optimizer: it averages the gradients, and all ranks skip where one has inf."""
    net = build("mlp").float()
    ft = SparseFinetuner(net, process_group=dist.group.WORLD, score_steps=2, **ARGUMENTS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i in range(6):
        ft.zero_grad()
        value = net(mine(data(4, seed=i)).float()).square().mean()
        bad = i in (1, 4) and dist.get_rank() == i % 2
        scaler.scale(value * (float("inf") if bad else 1.0)).backward()
        scaler.step(ft)
        scaler.update()
        assert ft.evidence.count == [1, 1][i] if i < 2 else ft.selection is not None
        same_everywhere(net.parameters())
    ft.verify()


def by_sample(criterion: str, part):
    """Evidence of samples that are unevenly divided: one rank's alone would not do for "agreement"."""
    net = build("mlp")
    ft = SparseFinetuner(net, criterion=criterion, **ARGUMENTS)
    for of in ("source", "target") if criterion == "contrast" else ("target",):
        with ft.scoring(of=of):
            net(part(data(4, seed=len(of)))).square().mean().backward()
    ft.select()
    return net.state_dict(), ft.selection.rows, ft.scores()


def selections_by_hand():
    ft = SparseFinetuner(build("mlp"))
    with pytest.raises(RuntimeError, match="different selections"):
        ft.select({"1.weight": [dist.get_rank()]})
    assert ft.selection is None
    ft.select({"1.weight": [3]})


class Around(torch.nn.Module):
    """A module that holds a finetuned network and trains parameters of its own."""

    def __init__(self, net):
        super().__init__()
        self.net, self.scale = net, torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        return self.net(x) * self.scale


def ddp_around(late: bool, **options):
    """DDP wraps a module around the network, before the selection or after; hooks of the network's weights are called;
    `no_sync` and a communication hook as ever."""
    net = build("mlp")
    outer, sent, seen = Around(net), [], []
    ft = SparseFinetuner(net, score_steps=1, **ARGUMENTS)
    other = torch.optim.SGD([outer.scale], lr=1e-2)
    rows = {"1.weight": [0, 2], "3.weight": [1]}
    if late:
        ft.select(rows)
    model = DistributedDataParallel(outer, find_unused_parameters=True, **options)

    def hook(group, bucket):
        sent.append(bucket.buffer().numel())
        return allreduce_hook(group, bucket)

    model.register_comm_hook(None, hook)
    if not late:
        ft.select(rows)
    for i in range(4):
        sent.clear()
        if i == 2:  # from here on this weight's own gradient is asked for
            net[3].weight.register_hook(lambda grad: seen.append(grad.clone()))
        other.zero_grad()
        step(model, ft, mine(data(8, seed=i)), parts=2)
        other.step()
        trained = sum(p.numel() for p in ft.parameters()) + 3
        if i < 2:
            assert sum(sent) == trained, (sent, trained)
        same_everywhere([p.grad for p in ft.parameters()])
    assert len(seen) == 4
    assert all(grad.shape == net[3].weight.shape and not grad[0].any() for grad in seen)
    same_everywhere([*net.parameters(), outer.scale])
    ft.verify()
    ft.release()
    model(mine(data(4))).square().mean().backward()
    same_everywhere([p.grad for p in net.parameters()])
    return net.state_dict(), ft.selection.rows, {}


def ranks_that_differ():
    """Without DDP and without a process group the networks would drift apart."""
    net = build("mlp")
    ft = SparseFinetuner(net, **ARGUMENTS)
    ft.select({"1.weight": [3]})
    net(data(4, seed=dist.get_rank())).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"gradients of ranks 0 and 1 differ.*DistributedDataParallel"):
        ft.step()
    for first_step_without in (False, True):
        net = build("mlp")
        ft = SparseFinetuner(net, **ARGUMENTS)
        ft.select({"1.weight": [3]})
        if first_step_without:
            ft.step()
        sign = 1 - 2 * dist.get_rank()  # gradients of the same length
        (sign * net(data(4)).square().mean()).backward()
        with pytest.raises(RuntimeError, match="gradients of ranks 0 and 1 differ"):
            ft.step()


def main(rank: int, folder: str):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {
        "before": ddp_before_the_selection(wrapped=True),
        "before, model given": ddp_before_the_selection(wrapped=False),
        "after": ddp_after_the_selection(folder),
        "begun by one": begun_by_one(folder),
        "accumulation": accumulation(),
        "around, before": ddp_around(late=False),
        "around, after": ddp_around(late=True, gradient_as_bucket_view=True),
        **{name: by_sample(name, lambda x: x[:3] if rank == 0 else x[3:]) for name in ("agreement", "contrast")},
    }
    ddp_around_a_weight_of_an_op()
    without_ddp()
    selections_by_hand()
    ranks_that_differ()
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    gc.collect()  # a DDP model that is freed after its group can hang
    dist.destroy_process_group()
