"""A held network, and what the gradients of its weights are to be."""

import torch
from sample_networks import build, data

from minegan_fast.finetune import SparseFinetuner


def held(name="mlp", rows=None, **arguments):
    net = build(name)
    ft = SparseFinetuner(net, **{"lr": 1e-2, "optimizer": "sgd"} | arguments)
    ft.select(rows or {"1.weight": [1, 3]})
    return net, ft


def whole(ft, weight):
    """What the gradient of a weight is to be, from its leaf's."""
    link = weight.link
    part = next(p for p in ft.parameters() if p is link.leaf).grad
    zeros = torch.zeros_like(weight.detach())
    return zeros.index_copy(link.axis, link.rows, part.movedim(0, link.axis))


def backward(net, ft=None, times=1):
    if ft is not None:
        ft.zero_grad()
    for _ in range(times):
        net(data()).square().mean().backward()
