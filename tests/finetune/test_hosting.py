"""What a model lists and stores while leaves are in it."""

import copy

import pytest
import torch
from sample_networks import NETWORKS, build, data
from torch import nn

from minegan_fast.finetune import SparseFinetuner
from minegan_fast.finetune.hosting import plain_class
from minegan_fast.finetune.leaves import Rows


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dict_keeps_names_shapes_and_loads(name):
    net, plain = build(name), build(name, seed=3)
    ft = SparseFinetuner(net, density=0.5, criterion="random", scope="layer")
    ft.select()
    assert {n: v.shape for n, v in net.state_dict().items()} == {n: v.shape for n, v in plain.state_dict().items()}
    assert net.state_dict()._metadata == plain.state_dict()._metadata
    assert all(type(v) is torch.Tensor for v in net.state_dict().values())
    for assign in (False, True):
        plain = build(name, seed=4 + assign)
        assert str(net.load_state_dict(plain.state_dict(), assign=assign)) == "<All keys matched successfully>"
        assert all(torch.equal(v, plain.state_dict()[n]) for n, v in net.state_dict().items())
        assert len(ft.parameters()) == sum(isinstance(p, Rows) for p in net.parameters())
    plain.load_state_dict(net.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({})


def test_leaves_are_listed_behind_all_dense_parameters():
    net, plain = build("resnet"), build("resnet")
    ft = SparseFinetuner(net, density=0.5, criterion="random")
    ft.select()
    for ours, theirs in zip(net.modules(), plain.modules(), strict=True):
        dense = len(list(theirs.parameters()))
        assert [isinstance(p, Rows) for p in list(ours.parameters())[:dense]] == [False] * dense
        assert all(isinstance(p, Rows) for p in list(ours.parameters())[dense:])
    assert len(list(net.parameters())) == len(list(plain.parameters())) + len(ft.parameters())


def test_averaging_scripts_pair_the_right_parameters():
    """An EMA that zips parameters, one that goes by name, and torch's own, on a copy from before the selection."""
    net = build("resnet")
    zipped, named = copy.deepcopy(net), copy.deepcopy(net)
    swa = torch.optim.swa_utils.AveragedModel(net, avg_fn=lambda mean, value, n: mean.lerp(value, 0.5))
    reference = copy.deepcopy(net)
    ft = SparseFinetuner(net, lr=0.1, density=0.5, criterion="random")
    ft.select()
    swa.update_parameters(net)
    for _ in range(2):
        ft.zero_grad()
        net(data()).square().mean().backward()
        ft.step()
        with torch.no_grad():
            for mean, value in zip(zipped.parameters(), net.parameters()):  # noqa: B905 - as scripts do it
                mean.lerp_(value, 0.5)
            live = dict(net.named_parameters())
            for name, mean in named.named_parameters():
                mean.lerp_(live[name], 0.5)
            for name, mean in reference.state_dict().items():
                if name in live:
                    mean.lerp_(net.state_dict()[name], 0.5)
        swa.update_parameters(net)
    for name, value in reference.named_parameters():
        assert torch.equal(value, zipped.get_parameter(name))
        assert torch.equal(value, named.get_parameter(name))
        assert torch.equal(value, swa.module.get_parameter(name))


def test_classes_are_the_modules_own():
    net = build("resnet")
    classes = {m: type(m) for m in net.modules()}
    ft = SparseFinetuner(net)
    ft.select({"2.conv1.weight": [0]})
    for module, kind in classes.items():
        assert isinstance(module, kind)
        assert plain_class(module) is kind
        assert type(module).__name__ == kind.__name__
    assert repr(net) == repr(build("resnet"))
    ft.select({"1.conv1.weight": [0]})
    assert type(net[2]) is classes[net[2]]  # no leaf is below it any more
    assert [p for p in net.parameters() if isinstance(p, Rows)] == [net[1].conv1.weight_rows]


def test_a_name_that_is_taken_is_avoided():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2))
            self.weight_rows = 5

        def forward(self, x):
            assert self.weight_rows == 5
            return x @ self.weight.T

    net = Odd()
    ft = SparseFinetuner(net)
    ft.select({"weight": [1]})
    net(torch.randn(4, 2)).sum().backward()
    assert ft.parameters()[0].grad is not None
    assert list(net.state_dict()) == ["weight"]


def test_a_held_parameter_is_not_replaced_or_resized():
    net = build("mlp")
    ft = SparseFinetuner(net)
    ft.select({"1.weight": [1]})
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with pytest.raises(RuntimeError, match=r"'weight' of a Linear is finetuned sparsely.*release\(\)"):
        net[1].weight = nn.Parameter(torch.zeros(7, 108).double())
    for target in (net[1].weight, net[3].weight):
        with pytest.raises(ValueError, match=r"given data of shape \[2, 2\]"):
            target.data = torch.zeros(2, 2).double()
    with pytest.raises(ValueError, match=r"rows \[1, 108\] of a weight"):
        ft.parameters()[0].data = torch.zeros(3, 108).double()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    ft.verify()
    ft.release()
    net[1].weight = nn.Parameter(torch.zeros(7, 108).double())


def test_names_are_those_of_the_state_dict():
    """So that an average by names, made before the selection, still finds its partners."""
    net = build("resnet")
    average = copy.deepcopy(net)
    ft = SparseFinetuner(net)
    ft.select({"1.conv1.weight": [1]})
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in average.named_parameters()]
    assert [n for n, _ in net[1].named_parameters()] == [n for n, _ in average[1].named_parameters()]
    listed = list(net.parameters())
    assert listed[-1] is ft.parameters()[0]
    assert all(p.shape == q.shape for p, q in zip(average.parameters(), listed, strict=False))
    net(data()).sum().backward()
    net.zero_grad()
    assert ft.parameters()[0].grad is None
