"""affine=True: what is one number per neuron trains everywhere, and density is about the rows of weights."""

import copy

import pytest
import torch
from sample_networks import RowReference, assert_same, build, data, loss
from torch import nn

from minegan_fast.finetune import Selection, SparseFinetuner, load_delta
from minegan_fast.finetune.evidence import CRITERIA
from minegan_fast.finetune.selection import SCOPES

NETWORKS = ["resnet", "modulated", "constant", "equalised", "spectral"]


def make(name, **arguments):
    net = build(name).eval()
    return net, SparseFinetuner(net, lr=1e-2, affine=True, density=0.3, **arguments)


def step(net, ft, i):
    ft.zero_grad()
    loss(net, data(seed=i), penalties=False).backward()
    ft.step()


def single(name, net):
    """Names of the parameters that are one number per neuron, by their shapes in these networks."""
    return {n for n, p in net.named_parameters() if p.ndim < 2 or (name == "constant" and n == "shifts.0")}


@pytest.mark.parametrize("budget", ["neurons", "parameters"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_trains(name, budget):
    net, ft = make(name, criterion="random", budget=budget)
    plain = copy.deepcopy(net)
    selection = ft.select()
    vectors, sizes = single(name, plain), {n: p.numel() for n, p in plain.named_parameters()}
    weights = sum(size for n, size in sizes.items() if n not in vectors)
    leaves = {n: p.link.leaf for n, p in net.named_parameters()}
    assert all(leaves[n] is not None and leaves[n].numel() == sizes[n] for n in vectors)
    trained = sum(p.numel() for n, p in leaves.items() if n not in vectors and p is not None)
    if budget == "parameters" and weights:
        assert selection.density == trained / weights
        assert selection.density >= 0.3
    assert 0 < trained < weights
    for i in range(2):
        step(net, ft, i)
    for n, p in net.named_parameters():
        moved = (p != plain.get_parameter(n)).sum()
        assert (moved > 0) if n in vectors else (moved <= (0 if leaves[n] is None else leaves[n].numel()))
    ft.verify()


@pytest.mark.parametrize("name", NETWORKS)
def test_it_trains_as_these_rows_do(name, tmp_path):
    net, ft = make(name, criterion="random", ema_decay=0.8)
    plain, base = copy.deepcopy(net), copy.deepcopy(net)
    ft.select()
    reference = RowReference(plain, ft, lambda leaves: torch.optim.Adam(leaves, lr=1e-2, betas=(0.0, 0.99)))
    mean = copy.deepcopy(plain)
    for i in range(3):
        step(net, ft, i)
        loss(plain, data(seed=i), penalties=False).backward()
        reference.step()
        for e, p in zip(mean.parameters(), plain.parameters(), strict=True):
            e.data.lerp_(p.data, 0.2)
    assert_same(net, plain, 1e-10)
    assert_same(ft.ema_model(), mean, 1e-10)
    ft.save_delta(tmp_path / "delta")
    load_delta(base, tmp_path / "delta")
    assert_same(base, net)
    ft.verify()
    ft.release()
    assert all(p.requires_grad and type(p) is nn.Parameter for p in net.parameters())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "contrast"])
def test_every_way_of_choosing(criterion, scope):
    """The ranking is that of the weights by themselves."""
    arguments = {"criterion": criterion, "scope": scope, "score_steps": 2}
    _, ft = make("resnet", **arguments)
    net = build("resnet").eval()
    for name, p in net.named_parameters():
        p.requires_grad_(name not in single("resnet", net))
    alone = SparseFinetuner(net, lr=1e-2, density=0.3, **arguments)
    for i in range(3):
        for optimizer in (ft, alone):
            step(optimizer.model, optimizer, i)
    assert ft.selection.always == {"0.bias", *(f"{i}.bn{j}.weight" for i in (1, 2) for j in (1, 2))}
    rows = {n: r.tolist() for n, r in ft.selection.rows.items() if n not in ft.selection.always}
    if criterion not in ("random", "movement"):  # which depend on what else there is
        assert rows == {n: r.tolist() for n, r in alone.selection.rows.items()}
    assert ft.selection.density == sum(map(len, rows.values())) / 20 == (0.25 if scope == "layer" else 0.3)
    ft.verify()


def test_a_run_resumes_to_the_bit():
    net, ft = make("resnet", ema_decay=0.9, score_steps=2)
    states = []
    for i in range(6):
        states.append((copy.deepcopy(net.state_dict()), copy.deepcopy(ft.state_dict())))
        step(net, ft, i)
    for stop in (0, 1, 4):
        again, other = make("resnet", ema_decay=0.9, score_steps=2)
        again.load_state_dict(states[stop][0])
        other.load_state_dict(states[stop][1])
        for i in range(stop, 6):
            step(again, other, i)
        assert_same(again, net)
        assert_same(other.ema_model(), ft.ema_model())
        assert other.selection == ft.selection
        with pytest.raises(ValueError, match="affine=True, this optimizer has False"):
            SparseFinetuner(build("resnet"), ema_decay=0.9).load_state_dict(states[stop][1])


def test_scale_and_shift_alone():
    net, ft = make("resnet")
    plain = copy.deepcopy(net)
    selection = ft.select({})
    assert selection.density == 0
    step(net, ft, 0)
    changed = {n for n, p in net.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert changed == single("resnet", plain)
    ft.verify()


def test_selections_by_hand_and_from_files(tmp_path):
    _, ft = make("resnet", budget="parameters")
    selection = ft.select({"1.conv1.weight": [0, 2]})
    assert selection.rows["0.bias"].tolist() == [0, 1, 2, 3]
    assert selection.counts()["1.bn1.weight"] == (4, 4)
    assert selection.density == 2 * 36 / (12 + 4 * 144)
    selection.save(tmp_path / "s")
    loaded = Selection.load(tmp_path / "s")
    assert loaded == selection
    assert (loaded.density, loaded.always) == (selection.density, selection.always)
    assert make("resnet")[1].select(loaded) == selection
    control = selection.shuffled(3)
    assert control.counts() == selection.counts()
    assert control.density == selection.density
    assert ft.select(control) == control
    with pytest.raises(ValueError, match=r"trains all 4 rows of '1\.bn1\.weight'"):
        ft.select({"1.bn1.weight": [1]})
    with pytest.raises(ValueError, match="another model"):
        SparseFinetuner(build("resnet")).select(loaded)


def test_a_model_of_nothing_else():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Tanh()).double()
    ft = SparseFinetuner(net, affine=True, criterion="magnitude")
    assert ft.select().rows["0.weight"].tolist() == [0, 1, 2]
    assert ft.selection.density == 0
    step(net, ft, 0)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="affine must be True or False, got 'gains'"):
        SparseFinetuner(build("mlp"), affine="gains")
