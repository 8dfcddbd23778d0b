"""Sparse training is dense training of the same rows; everything else keeps its bits."""

import copy

import pytest
import torch
from sample_networks import CUDA, FIRST_ORDER, NETWORKS, RowReference, assert_same, build, data, loss

from minegan_fast.finetune import FrozenNeuronsChanged, SparseFinetuner
from minegan_fast.ops import use_backend

OPTIMIZERS = {
    "adam": ({"lr": 2e-2, "betas": (0.5, 0.9), "weight_decay": 0.1}, torch.optim.Adam),
    "adamw": ({"lr": 2e-2, "betas": (0.0, 0.99), "weight_decay": 0.1}, torch.optim.AdamW),
    "sgd": ({"lr": 2e-2, "momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD),
}


@use_backend("reference")  # one rounding more, and the transformer's key bias, whose gradient is noise, goes elsewhere
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_train_as_under_torch_optim(name, optimizer):
    net, reference = build(name), build(name)
    x, second_order = data(), name not in FIRST_ORDER
    arguments, torch_optimizer = OPTIMIZERS[optimizer]
    ft = SparseFinetuner(net, density=0.4, criterion="random", scope="layer", optimizer=optimizer, **arguments)
    ft.select()
    rows = RowReference(reference, ft, lambda leaves: torch_optimizer(leaves, **arguments))
    start = copy.deepcopy(net)
    for _ in range(5):
        loss(net, x, second_order).backward()
        ft.step()
        ft.zero_grad()
        loss(reference, x, second_order).backward()
        rows.step()
    assert_same(net, reference, 1e-12)  # float64: the same operations, summed in another order at most
    moved = [n for n, p in net.state_dict().items() if not torch.equal(p, start.state_dict()[n])]
    assert set(ft.selection.rows) - {"conv1.bias"} <= set(moved)
    ft.verify()


@pytest.mark.parametrize("name", ["mlp", "modulated", "resnet"])
def test_density_one_is_dense_training(name):
    net, dense = build(name), build(name)
    x = data()
    ft = SparseFinetuner(net, lr=1e-2, density=1.0, criterion="magnitude")
    ft.select()
    assert ft.selection.density == 1
    assert sum(p.numel() for p in ft.parameters()) == sum(p.numel() for p in dense.parameters())
    adam = torch.optim.Adam(dense.parameters(), lr=1e-2, betas=(0.0, 0.99))
    for _ in range(5):
        for model, optimizer in ((net, ft), (dense, adam)):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
    assert_same(net, dense, 1e-12)  # float64: the same operations, summed in another order at most


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - FIRST_ORDER))
def test_gradients_of_gradients_reach_the_rows_only(name):
    net, reference = build(name), build(name)
    ft = SparseFinetuner(net, density=0.4, criterion="random", scope="layer")
    ft.select()
    net.eval(), reference.eval()
    named = dict(reference.named_parameters())
    members = [(m, layer.name) for layer in ft.layers for m in layer.members if layer.name in ft.selection.rows]
    sparse = torch.autograd.grad(loss(net, data()), ft.parameters())
    dense = torch.autograd.grad(loss(reference, data()), [named[m.name] for m, _ in members])
    for (m, layer), ours, theirs in zip(members, sparse, dense, strict=True):
        theirs = theirs.reshape(1) if theirs.ndim == 0 else theirs.movedim(m.axis, 0)[ft.selection.rows[layer]]
        # Sums in another order, which a unit in the last place of the largest entry follows.
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_bits_under_everything(dtype, device):
    """Weight decay, momentum, EMA, autocast, loss scaling, clipping, accumulation and re-selection, all at once."""
    net = build("resnet").to(device, dtype)
    net[1].requires_grad_(False)
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    x = data(dtype=dtype).to(device)
    ft = SparseFinetuner(
        net,
        lr=1e-2,
        optimizer="adamw",
        weight_decay=0.5,
        betas=(0.9, 0.99),
        density=0.3,
        ema_decay=0.9,
        criterion="random",
    )
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    trained = {}
    for seed in (0, 1):
        ft.evidence.seed = seed
        for name, rows in ft.select().rows.items():
            trained.setdefault(name, set()).update(rows.tolist())
        for _ in range(4):
            ft.zero_grad()
            for _ in range(2):
                with torch.autocast(device, torch.bfloat16):
                    value = net(x).float().square().mean()
                scaler.scale(value).backward()
            scaler.unscale_(ft)
            torch.nn.utils.clip_grad_norm_(ft.parameters(), 1.0)
            scaler.step(ft)
            scaler.update()
        ft.verify()
    now, average = dict(net.named_parameters()), dict(ft.ema_model().named_parameters())
    members = {m.name: (m.axis, layer.name) for layer in ft.layers for m in layer.members}
    moved = 0
    for name, value in start.items():
        axis, layer = members.get(name, (0, None))
        frozen = sorted(set(range(value.shape[axis])) - trained.get(layer, set()))
        for other in (now[name], average[name]):
            assert torch.equal(value.movedim(axis, 0)[frozen], other.detach().movedim(axis, 0)[frozen]), name
        moved += (value != now[name]).sum().item()
    assert moved


def test_verify_names_a_frozen_row_that_changed():
    net = build("mlp")
    ft = SparseFinetuner(net, density=0.3)
    ft.select({"1.weight": [0, 2]})
    with torch.no_grad():
        net[1].weight[2, 0] += 1  # trains: no offence
    ft.verify()
    with torch.no_grad():
        net[1].weight[3, 107] = torch.nextafter(net[1].weight[3, 107], torch.tensor(9.0).double())
    with pytest.raises(FrozenNeuronsChanged, match=r"1\.weight rows 3[;.]"):
        ft.verify()


def test_verify_sees_every_kind_of_frozen_value():
    for name in ("0.weight", "1.bn1.bias", "1.conv1.weight"):
        net = build("resnet")
        net[1].conv1.requires_grad_(False)
        ft = SparseFinetuner(net, exclude="1.bn1")
        ft.select({"2.conv1.weight": [1]})
        ft.verify()
        parameter = net.get_parameter(name)
        parameter.data.view(-1)[0] += 1e-9
        with pytest.raises(FrozenNeuronsChanged, match=name):
            ft.verify()


def test_reselection_keeps_moments_of_kept_rows():
    """Kept rows go on as if nothing had happened; a new one starts as under a new optimizer; a dropped one stops."""
    net, other = build("mlp"), build("mlp")
    x = data()
    arguments = {"lr": 1e-2, "betas": (0.9, 0.99), "ema_decay": 0.5}
    ft, whole = (SparseFinetuner(n, **arguments) for n in (net, other))
    ft.select({"3.weight": [0, 1]})
    whole.select({"3.weight": [0, 1]})

    def step(n, optimizer):
        optimizer.zero_grad()
        # only the last layer trains, and this loss couples none of its rows
        n(x).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step(net, ft), step(other, whole)
    dropped = net[3].weight[0].detach().clone()
    ft.select({"3.weight": [1, 4]})
    fresh = copy.deepcopy(net)
    new = torch.optim.Adam(fresh[3].parameters(), lr=1e-2, betas=(0.9, 0.99))
    mean = fresh[3].weight[4].detach().clone()
    for _ in range(3):
        step(net, ft), step(other, whole), step(fresh, new)
        mean.lerp_(fresh[3].weight[4].detach(), 0.5)
    assert torch.equal(net[3].weight[0], dropped)
    # two ages in one leaf: the bias corrections are vectors, rounded once more than torch's scalars
    torch.testing.assert_close(net[3].weight[1], other[3].weight[1], rtol=1e-14, atol=0)
    torch.testing.assert_close(net[3].weight[4], fresh[3].weight[4], rtol=1e-14, atol=0)
    torch.testing.assert_close(ft.ema_model()[3].weight[4], mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(ft.ema_model()[3].weight[1], whole.ema_model()[3].weight[1], rtol=1e-14, atol=0)
    assert torch.equal(ft.ema_model()[3].weight[0], dropped)
    ft.verify()


def test_release_gives_the_plain_model_back():
    net = build("resnet")
    net[1].requires_grad_(False)
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    types = [type(m) for m in net.modules()]
    ft = SparseFinetuner(net, density=0.5, criterion="random")
    ft.select()
    loss(net, data()).backward()
    ft.step()
    trained = {n: v.clone() for n, v in net.state_dict().items()}
    ft.release()
    ft.release()
    assert {n: p.requires_grad for n, p in net.named_parameters()} == flags
    assert [type(m) for m in net.modules()] == types
    assert all(type(p) is torch.nn.Parameter and not hasattr(p, "link") for p in net.parameters())
    assert all(torch.equal(v, trained[n]) for n, v in net.state_dict().items())
    loss(net, data()).backward()
    assert net[2].conv1.weight.grad.shape == net[2].conv1.weight.shape
    for call in (ft.step, ft.select, lambda: ft.load_state_dict({})):
        with pytest.raises(RuntimeError, match="release"):
            call()
    SparseFinetuner(net, criterion="random").select()
