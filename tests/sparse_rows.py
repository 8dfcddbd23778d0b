"""Finetuning some rows of every layer of a network against its dense gradients."""

import copy

import torch

from minegan_fast.finetune import SparseFinetuner


def assert_rows_train_as_dense(net, loss, dense=()):
    """Gradients of the selected rows, every second of each layer, are those rows of the dense ones.

    Every weight's gradient comes of its rows alone, but those of the layers `dense`, whose dense one is gathered.
    """
    ft = SparseFinetuner(copy.deepcopy(net))
    ft.select({layer.name: list(range(0, layer.neurons, 2)) for layer in ft.layers})
    for model in (net, ft.model):
        torch.manual_seed(5)
        loss(model).backward()
    for layer in ft.layers:
        for member in layer.members:
            link = member.parameter.link
            expected = net.get_parameter(member.name).grad.movedim(link.axis, 0)[link.rows]
            torch.testing.assert_close(link.leaf.grad, expected, rtol=1e-10, atol=1e-12, msg=member.name)
            assert bool(expected.any())
    ways = {line.split()[0]: line for line in ft.summary().splitlines()[2:-1]}
    assert {name for name, line in ways.items() if "dense" in line} == set(dense)
    assert any("rows: conv2d" in line for line in ways.values())
    assert not any("not used" in line for line in ways.values())
