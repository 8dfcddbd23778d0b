"""Scoring and selecting again while the model is held: as a plain copy would be scored, and training goes on."""

import copy

import pytest
import torch
from sample_networks import assert_same, build, data
from test_evidence import see_the_source

from minegan_fast.finetune import SparseFinetuner
from minegan_fast.finetune.evidence import CRITERIA


def step(ft, i):
    ft.zero_grad()
    ft.model(data(seed=i).to(next(ft.model.parameters()).dtype)).square().mean().backward()
    ft.step()


def trained(name, dtype, rows=None, **arguments):
    """A network of which some rows have trained, and its optimizer."""
    net = build(name).eval().to(dtype)
    ft = SparseFinetuner(net, lr=1e-2, betas=(0.5, 0.9), ema_decay=0.9, **arguments)
    ft.select(rows or {layer.name: [0, 2] for layer in ft.layers[:3]})
    for i in range(3):
        step(ft, i)
    return ft


def score(ft):
    dtype = next(ft.model.parameters()).dtype
    see_the_source(ft, [data(2, seed=7).to(dtype)])
    with ft.scoring():
        for seed in (1, 2):
            ft.model(data(seed=seed).to(dtype)).square().mean().backward()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("name", "dtype"), [("resnet", torch.float64), ("mlp", torch.bfloat16)])
def test_a_held_model_is_scored_as_a_plain_one(name, dtype, criterion):
    """And nothing of it moves: not the rows' float32 values behind a half-precision weight either."""
    ft = trained(name, dtype, criterion=criterion, density=0.4)
    plain = SparseFinetuner(copy.deepcopy(ft.model), lr=1e-2, betas=(0.5, 0.9), criterion=criterion)
    twin = trained(name, dtype, criterion=criterion, density=0.4)
    before = copy.deepcopy(ft.model.state_dict()), [p.detach().clone() for p in ft.parameters()]
    for optimizer in (ft, plain):
        score(optimizer)
    for layer, scores in plain.scores().items():
        assert torch.equal(ft.scores()[layer], scores)
    assert all(torch.equal(v, before[0][n]) for n, v in ft.model.state_dict().items())
    assert all(torch.equal(p, v) for p, v in zip(ft.parameters(), before[1], strict=True))
    ft.verify()
    for i in (5, 6):
        step(ft, i)
        step(twin, i)
    assert_same(ft.model, twin.model)
    ft.verify()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_another_selection_by_new_evidence(criterion):
    """Kept neurons keep their moments, and the others stand still from then on."""
    rows = {layer.name: [0, 2, 3] for layer in SparseFinetuner(build("resnet")).layers}
    ft = trained("resnet", torch.float64, rows, criterion=criterion, density=0.4)
    old, moments = ft.selection, {p.link.weight: ft.state[p]["exp_avg_sq"].clone() for p in ft.parameters()}
    score(ft)
    scores = ft.scores()
    new = ft.select()
    order = torch.cat([scores[name] for name in sorted(scores)]).argsort(descending=True, stable=True)
    assert sum(len(rows) for rows in new.rows.values()) == round(0.4 * len(order))
    kept = 0
    for layer in ft.layers:
        for member in layer.members:
            link = member.parameter.link
            for row in set(new.rows.get(layer.name, torch.empty(0)).tolist()) & {0, 2, 3}:
                before, now = [0, 2, 3].index(row), link.rows.tolist().index(row)
                assert torch.equal(ft.state[link.leaf]["exp_avg_sq"][now], moments[member.parameter][before])
                kept += 1
    assert kept
    assert new != old
    frozen = copy.deepcopy(ft.model.state_dict())
    for i in (5, 6):
        step(ft, i)
    ft.verify()
    assert any(not torch.equal(v, frozen[n]) for n, v in ft.model.state_dict().items())


def test_a_selection_uses_up_the_source_too():
    ft = SparseFinetuner(build("mlp"), criterion="contrast", density=0.4)
    score(ft)
    ft.select()
    with ft.scoring():
        ft.model(data()).square().mean().backward()
    with pytest.raises(RuntimeError, match=r'scoring\(of="source"\)'):
        ft.select()
