"""Fisher and agreement by their definition, and what a scoring() block gives and warns of."""

import copy
import warnings

import torch

from minegan_fast.finetune import SparseFinetuner


def loss_of(net, x, reduction="mean"):
    losses = net(x).flatten(1).square().sum(1)
    return losses.mean() if reduction == "mean" else losses.sum()


def scored(net, batches, loss=loss_of, criterion="fisher", **options):
    """Scores and the names in the warning."""
    ft = SparseFinetuner(net, criterion=criterion)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ft.scoring(**options):
            for x in batches:
                loss(net, x).backward()
    messages = [str(w.message) for w in caught if "not sample by sample" in str(w.message)]
    assert len(messages) <= 1
    named = set(messages[0].split(": ")[1].split(". They")[0].split(", ")) if messages else set()
    assert named == ft.evidence.by_batch
    return ft.scores(), named


def one_by_one(net, batches, loss=loss_of, criterion="fisher"):
    """By the definition, with plain autograd: the mean over samples of the squared gradient, summed over neurons; for
    "agreement" the squared mean gradient over that."""
    net = copy.deepcopy(net)
    ft = SparseFinetuner(net)
    fisher = {layer.name: torch.zeros(layer.neurons, dtype=torch.float64) for layer in ft.layers}
    means = {m.name: 0 for layer in ft.layers for m in layer.members}
    samples = [x for batch in batches for x in batch.split(1)]
    for x in samples:
        net.zero_grad()
        loss(net, x).backward()
        for layer in ft.layers:
            for m in layer.members:
                if m.parameter.grad is not None:
                    g = m.parameter.grad.double()
                    g = g.movedim(m.axis, 0).flatten(1) if g.dim() > 1 else g.reshape(-1, 1)
                    fisher[layer.name] += g.square().sum(1) / len(samples)
                    means[m.name] = means[m.name] + g / len(samples)
    if criterion == "fisher":
        return {name: total.float() for name, total in fisher.items()}
    norms = {x.name: sum(means[m.name].square().sum(1) for m in x.members) for x in ft.layers}
    return {name: (norm / fisher[name]).nan_to_num().float() for name, norm in norms.items()}


def assert_equal(scores, expected, rtol=2e-6, but=()):
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        if name not in but:
            torch.testing.assert_close(
                score, expected[name], rtol=rtol, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
            )
