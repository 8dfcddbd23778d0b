"""Training scripts in which only the optimizer line is another."""

import copy

import pytest
import torch
from sample_networks import build, data, loss
from torch import nn

from minegan_fast.finetune import SparseFinetuner
from minegan_fast.ops import use_backend


@use_backend("reference")  # whose order of rounding is torch.optim's; the others are compared in tests/ops
def test_scheduler_scaler_clipping_and_accumulation():
    """Scoring and training through the whole apparatus equal the same run with rows chosen by hand and torch's Adam."""
    net, twin = build("resnet").float(), build("resnet").float()
    ft = SparseFinetuner(net, lr=1e-2, density=0.3, score_steps=2, betas=(0.5, 0.9))
    group = ft.param_groups[0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(ft, lambda i: 0.9**i)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    reference, leaves = None, {}
    for i in range(6):
        ft.zero_grad()
        twin.zero_grad()
        for micro in range(2):
            x = data(seed=10 * i + micro, dtype=torch.float32)
            scaler.scale(net(x).square().mean() / 2).backward()
            (twin(x).square().mean() / 2).backward()
        scaler.unscale_(ft)
        norm = torch.nn.utils.clip_grad_norm_(ft.parameters(), 0.05)
        scaler.step(ft)
        scaler.update()
        scheduler.step()
        if i < 2:
            assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=False))
            assert (ft.selection is not None) == (i == 1)
            continue
        if reference is None:
            for layer in ft.layers:
                for m in layer.members:
                    if layer.name in ft.selection.rows:
                        rows, p = ft.selection.rows[layer.name], twin.get_parameter(m.name)
                        leaves[m.name] = rows, p.detach()[rows].clone().requires_grad_()
            reference = torch.optim.Adam(
                [leaf for _, leaf in leaves.values()], lr=1e-2, betas=(0.5, 0.9), foreach=False
            )
        for name, (rows, leaf) in leaves.items():
            leaf.grad = twin.get_parameter(name).grad[rows].clone()
        for g in reference.param_groups:
            g["lr"] = 1e-2 * 0.9**i
        want = torch.nn.utils.clip_grad_norm_([leaf for _, leaf in leaves.values()], 0.05)
        assert torch.equal(norm, want)
        reference.step()
        with torch.no_grad():
            for name, (rows, leaf) in leaves.items():
                twin.get_parameter(name)[rows] = leaf
        # scaling by a power of two is exact, so nothing but the mechanism differs
        for name, p in twin.named_parameters():
            assert torch.equal(net.get_parameter(name), p), name
    assert ft.param_groups[0] is group
    assert group["lr"] == 1e-2 * 0.9**6
    ft.verify()


def test_steps_skipped_for_inf_do_not_count():
    net = build("mlp").float()
    ft = SparseFinetuner(net, density=0.3, score_steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    miner = nn.Linear(2, 2)
    ft.add_param_group({"params": miner.parameters()})
    for i, bad in enumerate((False, True, True, False, True, False)):
        ft.zero_grad()
        value = net(data(dtype=torch.float32)).square().mean() + miner(torch.ones(1, 2)).sum()
        scaler.scale(value * (float("inf") if bad else 1)).backward()
        before = [p.detach().clone() for p in [*net.parameters(), *miner.parameters()]]
        scaler.step(ft)
        scaler.update()
        if bad:
            assert all(map(torch.equal, before, [*net.parameters(), *miner.parameters()]))
        assert ft.evidence.count == [1, 1, 1, 2, 2, 2][i]
        assert (ft.selection is not None) == (i >= 3)
    assert scaler.get_scale() == 2.0 * 0.5**3
    for name, score in ft.scores().items():
        assert score.isfinite().all(), name


def test_a_scaler_leaves_the_step_to_the_optimizer_only_where_it_has_to():
    """Libraries that clip between unscaling and step refuse an optimizer that unscales in its step, and tell by an
    uncalled `step` that it was skipped."""
    for arguments, asked in ({}, False), ({"lr": torch.tensor(1e-3)}, True):
        net = build("mlp").float()
        ft = SparseFinetuner(net, **arguments)
        ft.select({"1.weight": [0]})
        scaler, calls = torch.amp.GradScaler("cpu", init_scale=2.0), []
        ft.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        scaler.scale(net(data(dtype=torch.float32)).sum() * float("inf")).backward()
        before = [p.detach().clone() for p in net.parameters()]
        scaler.step(ft)
        scaler.update()
        assert bool(calls) == asked
        assert scaler.get_scale() == 1.0
        assert all(map(torch.equal, before, net.parameters()))


def test_default_dtype_and_device_change_nothing():
    """A script may make its tensors float64, or on another device than the model, unless it says otherwise."""
    runs, samples = [], [data(seed=seed, dtype=torch.float32) for seed in range(4)]
    for dtype, device in (torch.float32, None), (torch.float64, None), (torch.float32, "meta"):
        net = build("mlp").float()
        ft = SparseFinetuner(net, lr=1e-2, density=0.3, criterion="random", score_steps=1)
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        try:
            for x in samples:
                ft.zero_grad()
                net(x).square().mean().backward()
                ft.step()
            ft.select(ft.selection.shuffled(0))
            ft.step()
            ft.verify()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        steps = [ft.state[p]["step"] for p in ft.parameters() if p in ft.state]
        assert steps
        assert all(s.dtype == torch.float32 and s.max() <= 5 for s in steps)
        runs.append([*net.parameters()])
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_steps_without_a_gradient_do_not_count():
    """A miner may train for itself, before and between the steps that score."""
    net, miner = build("mlp"), nn.Linear(2, 2).double()
    ft = SparseFinetuner(net, score_steps=2)
    ft.add_param_group({"params": miner.parameters()})
    for i in range(3):
        miner(torch.ones(1, 2).double()).sum().backward()
        if i == 1:
            net(data()).sum().backward()
        ft.step()
        ft.zero_grad()
        assert ft.evidence.count == (i >= 1)
    ft.step()
    assert ft.evidence.count == 1
    assert ft.selection is None


@pytest.mark.parametrize("when", ["while scoring", "while training"])
def test_a_resumed_script_needs_both_state_dicts(when, caplog):
    """Weights alone name no neurons: without the optimizer's state the run scores and selects anew, and says so."""

    def run(net, ft, steps):
        for step in steps:
            ft.zero_grad()
            net(data(seed=step)).square().mean().backward()
            ft.step()

    def begun():
        net = build("resnet")
        return net, SparseFinetuner(net, lr=1e-2, density=0.3, score_steps=3)

    whole, ft = begun()
    run(whole, ft, range(8))
    cut = {"while scoring": 2, "while training": 5}[when]
    net, first = begun()
    run(net, first, range(cut))
    saved, state = copy.deepcopy(net.state_dict()), copy.deepcopy(first.state_dict())
    results = []
    for with_state in (True, False):
        net, again = begun()
        net.load_state_dict(saved)
        if with_state:
            again.load_state_dict(state)
        assert (again.selection is not None) == (with_state and cut >= 3)
        caplog.clear()
        run(net, again, range(cut, 8))
        told = [r.getMessage() for r in caplog.records if "selects anew" in r.getMessage()]
        assert len(told) == (0 if with_state and cut >= 3 else 1)
        if told:
            trained, neurons = (sum(n) for n in zip(*again.selection.counts().values(), strict=True))
            assert f"scored for 3 steps and has selected: {trained} of {neurons} neurons" in told[0]
        results.append(all(torch.equal(p, q) for p, q in zip(net.parameters(), whole.parameters(), strict=True)))
    assert results == [True, False]


def test_closure():
    net = build("mlp")
    ft = SparseFinetuner(net, lr=1e-3, density=0.5, score_steps=1)

    def closure():
        ft.zero_grad()
        value = net(data()).square().mean()
        value.backward()
        return value

    with torch.no_grad():  # step() turns gradients on for the closure
        values = [ft.step(closure).item() for _ in range(5)]
    assert values[0] == values[1]
    assert values[4] < values[3] < values[2] < values[1]


def test_gan_loop_that_toggles_requires_grad():
    """Two networks, two sparse optimizers, R1, the usual toggling: no dense gradient, no frozen bit changes."""
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 108), nn.Tanh(), nn.Unflatten(1, (3, 6, 6)))
    d = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(128, 1))
    opt_g = SparseFinetuner(g, lr=1e-2, density=0.2, score_steps=2, ema_decay=0.9)
    opt_d = SparseFinetuner(d, lr=1e-2, density=0.2, score_steps=2)
    average = copy.deepcopy(g)
    real = data(4, dtype=torch.float32)
    softplus = nn.functional.softplus
    for i in range(6):
        g.requires_grad_(False)
        d.requires_grad_(True)
        g.zero_grad()
        d.zero_grad()
        x = real.clone().requires_grad_()
        scores = d(x)
        (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        (softplus(d(g(torch.randn(4, 4)))).mean() + softplus(-scores).mean() + grad.square().sum()).backward()
        assert all(p.grad is None for p in g.parameters())
        opt_d.step()
        for p in g.parameters():
            p.requires_grad = True
        for p in d.parameters():
            p.requires_grad = False
        opt_g.zero_grad()
        softplus(-d(g(torch.randn(4, 4)))).mean().backward()
        opt_g.step()
        live = dict(g.named_parameters())
        for name, p in average.named_parameters():
            p.data.mul_(0.9).add_(live[name].data, alpha=0.1)
        if i >= 2:
            for optimizer in (opt_g, opt_d):
                optimizer.verify()
    assert all(p.grad is not None for p in opt_g.parameters())


@use_backend("reference")  # whose order of rounding is torch.optim's; the others are compared in tests/ops
def test_added_parameters_train_from_the_first_step():
    net, miner, twin = build("mlp"), nn.Linear(108, 108).double(), nn.Linear(108, 108).double()
    twin.load_state_dict(miner.state_dict())
    ft = SparseFinetuner(net, lr=1e-2, density=0.3, score_steps=2, ema_decay=0.5)
    ft.add_param_group({"params": miner.parameters(), "lr": 3e-2})
    adam = torch.optim.Adam(twin.parameters(), lr=3e-2, betas=(0.0, 0.99))
    mean = {n: p.detach().clone() for n, p in twin.named_parameters()}
    for _ in range(4):
        frozen = copy.deepcopy(net)
        for m, optimizer, model in ((miner, ft, net), (twin, adam, frozen)):
            optimizer.zero_grad()
            model(m(data().flatten(1)).view(-1, 3, 6, 6)).square().mean().backward()
            optimizer.step()
        for n, p in twin.named_parameters():
            mean[n].lerp_(p.detach(), 0.5)
    assert torch.equal(miner.weight, twin.weight)
    assert torch.equal(miner.bias, twin.bias)
    average = ft.ema_model(miner)
    assert all(torch.equal(p, mean[n]) for n, p in average.named_parameters())
    assert len(ft.param_groups) == 2


@pytest.mark.parametrize("after", [False, True])
def test_excluded_parameters_can_be_added(after):
    net = build("mlp")
    ft = SparseFinetuner(net, lr=1e-2, exclude="1", ema_decay=0.5)
    if after:
        ft.select({"3.weight": [0]})
        assert not net[1].weight.requires_grad
    ft.add_param_group({"params": list(net[1].parameters())})
    if not after:
        ft.select({"3.weight": [0]})
    assert net[1].weight.requires_grad
    start = copy.deepcopy(net)
    for _ in range(2):
        ft.zero_grad()
        loss(net, data()).backward()
        ft.step()
    ft.verify()
    assert not torch.equal(net[1].weight, start[1].weight)
    assert torch.equal(net[3].weight[1:], start[3].weight[1:])
    assert not torch.equal(net[3].weight[0], start[3].weight[0])
    assert not torch.equal(ft.ema_model()[1].weight, net[1].weight)
    with pytest.raises(ValueError, match=r"'3\.weight' is a candidate"):
        ft.add_param_group({"params": net[3].weight})
    ft.release()
    assert net[1].weight.requires_grad
