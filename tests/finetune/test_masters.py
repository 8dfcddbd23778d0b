"""Half-precision weights train by float32 leaves; and what a plan of the step is made of may change at any time."""

import copy

import pytest
import torch
from sample_networks import CUDA, build, data
from torch import nn

from minegan_fast.finetune import SparseFinetuner, load_delta
from minegan_fast.finetune.saving import carry
from minegan_fast.ops import backends

ROWS = {"1.weight": [0, 2, 5]}
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def step(net, ft, seed=1):
    ft.zero_grad()
    dtype = next(net.parameters()).dtype
    net(data(seed=seed, dtype=torch.float64).to(dtype)).float().square().mean().backward()
    ft.step()


def selected(dtype, **arguments):
    net = build("mlp").to(dtype)
    ft = SparseFinetuner(net, **{"lr": 1e-5, "ema_decay": 0.9} | arguments)
    ft.select(ROWS)
    return net, ft


def agree(net, ft):
    """The dense rows are the leaf, rounded."""
    weight, leaf = net[1].weight, ft.parameters()[0]
    return torch.equal(weight[leaf.link.rows], leaf.to(weight.dtype))


@HALF
def test_small_steps_are_not_rounded_away(dtype):
    net, ft = selected(dtype)
    leaf, start = ft.parameters()[0], net[1].weight.detach().clone()
    assert leaf.dtype == torch.float32
    for _ in range(60):
        step(net, ft)
        assert leaf.grad.dtype == torch.float32
        assert agree(net, ft)
    moved = (leaf.detach() - start[[0, 2, 5]].float()).abs()
    assert moved.max() > 1e-4  # of 60 steps of 1e-5, none of which moves a bfloat16 of size 0.1
    assert torch.equal(net[1].weight[1], start[1])
    ft.verify()


@HALF
def test_writes_from_outside_keep_what_they_do_not_touch(dtype):
    net, ft = selected(dtype)
    leaf = ft.parameters()[0]
    step(net, ft)
    before = leaf.detach().clone()
    assert not torch.equal(before, before.to(dtype).float())
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    assert net[1].weight.data is not None  # an access is a suspicion, no write
    with torch.no_grad():
        net[1].weight[2, 7] = 3.0
    leaf.link.sync()
    expected = before.clone()
    expected[1, 7] = 3.0
    assert torch.equal(leaf, expected)
    with torch.no_grad():
        leaf.clamp_(-0.01, 0.01)
    leaf.link.sync()
    assert agree(net, ft)


@HALF
def test_masters_come_back_with_the_weight(dtype):
    """A validation by the averaged weights, which are swapped in and out, rounds no master."""
    net, ft = selected(dtype)
    average = copy.deepcopy(net)
    with torch.no_grad():
        average[1].weight.mul_(1.5)
    leaf = ft.parameters()[0]
    for seed in (1, 2):
        step(net, ft, seed)
        before = leaf.detach().clone()
        assert not torch.equal(before, before.to(dtype).float())
        for _ in range(2):
            for p, q in zip(net.parameters(), average.parameters(), strict=True):
                kept = q.data.clone()
                q.data.copy_(p.data)
                p.data.copy_(kept)
            net(data(dtype=torch.float64).to(dtype))
            assert agree(net, ft)
        assert torch.equal(leaf, before)


@HALF
def test_a_model_that_changes_precision_keeps_its_masters(dtype):
    net, ft = selected(torch.float32)
    step(net, ft)
    leaf = ft.parameters()[0]
    before = leaf.detach().clone()
    net.to(dtype)
    assert torch.equal(leaf, before)
    assert net[1].weight.dtype == dtype
    assert agree(net, ft)
    step(net, ft)
    before = leaf.detach().clone()
    assert agree(net, ft)
    net.float()
    assert torch.equal(leaf, before)
    assert torch.equal(net[1].weight[[0, 2, 5]], before)
    net.double()
    step(net, ft)
    assert leaf.dtype == ft.state[leaf]["exp_avg"].dtype == torch.float64
    assert agree(net, ft)


@HALF
@pytest.mark.parametrize("model_first", [False, True])
def test_masters_are_saved_and_come_back(dtype, model_first, tmp_path):
    net, ft = selected(dtype)
    for _ in range(3):
        step(net, ft)
    other = build("mlp", seed=5).to(dtype)
    resumed = SparseFinetuner(other, lr=1e-5, ema_decay=0.9)
    loads = [
        lambda: other.load_state_dict(copy.deepcopy(net.state_dict())),
        lambda: resumed.load_state_dict(copy.deepcopy(ft.state_dict())),
    ]
    for load in loads if model_first else reversed(loads):
        load()
    for _ in range(2):
        step(net, ft)
        step(other, resumed)
    for ours, theirs in zip(ft.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))
    base = build("mlp").to(dtype)
    ft.save_delta(tmp_path / "delta.safetensors")
    load_delta(base, tmp_path / "delta.safetensors")
    assert all(map(torch.equal, net.state_dict().values(), base.state_dict().values()))
    assert ft.ema_model()[1].weight.dtype == dtype


def test_a_reselection_keeps_the_masters_of_kept_rows():
    net, ft = selected(torch.bfloat16)
    step(net, ft)
    before = ft.parameters()[0].detach().clone()
    ft.select({"1.weight": [2, 4]})
    assert torch.equal(ft.parameters()[0][0], before[1])
    assert torch.equal(ft.parameters()[0][1], net[1].weight[4].float())
    step(net, ft)
    ft.verify()


def test_rows_that_stay_keep_their_state():
    state = {"exp_avg": torch.randn(2, 4), "step": torch.tensor([3.0, 3.0]), "ema": torch.randn(2, 4)}
    leaf = torch.randn(2, 4)
    carried = carry(state, torch.tensor([0, 1]), torch.tensor([1, 2]), leaf)
    assert carried["step"].tolist() == [3, 0]
    assert torch.equal(carried["exp_avg"], torch.stack([state["exp_avg"][1], torch.zeros(4)]))
    assert torch.equal(carried["ema"], torch.stack([state["ema"][1], leaf[1]]))


def test_state_and_groups_that_change_between_steps():
    """The plan of the step is not stale after a new state, another momentum, other gradients or a layout."""
    net, ft = selected(torch.float32, optimizer="sgd", lr=1e-2, ema_decay=None)
    leaf = ft.parameters()[0]
    step(net, ft)
    ft.param_groups[0]["momentum"] = 0.5
    step(net, ft)
    assert torch.equal(ft.state[leaf]["momentum_buffer"], leaf.grad)
    ft.state.clear()
    step(net, ft)
    assert torch.equal(ft.state[leaf]["momentum_buffer"], leaf.grad)
    saved = copy.deepcopy(ft.state_dict())
    step(net, ft)
    ft.load_state_dict(saved)
    kept = ft.state[leaf]["momentum_buffer"].clone()
    step(net, ft)
    torch.testing.assert_close(ft.state[leaf]["momentum_buffer"], 0.5 * kept + leaf.grad)
    leaf.data = leaf.data.clone()
    net[1].weight.data = net[1].weight.data.clone()
    step(net, ft)
    assert agree(net, ft)


def test_a_tensor_as_learning_rate():
    net, ft = selected(torch.float32, lr=1e-2, ema_decay=None)
    other, twin = selected(torch.float32, lr=torch.tensor(1e-2), ema_decay=None)
    for lr in (1e-2, 1e-3):
        ft.param_groups[0]["lr"] = float(torch.tensor(lr))
        twin.param_groups[0]["lr"].fill_(lr)
        step(net, ft), step(other, twin)
    assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))


@pytest.mark.gpu
def test_a_cuda_graph_of_a_whole_iteration():
    """Forward, backward and step captured; replays equal eager steps, follow lr, and move no address."""
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(108, 64), nn.ReLU(), nn.Linear(64, 8)).cuda() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    fts = []
    for net in nets:
        fts.append(SparseFinetuner(net, lr=torch.tensor(1e-3, device="cuda"), ema_decay=0.9))
        fts[-1].select({"1.weight": [0, 5, 9], "3.weight": [1]})
    x = torch.zeros(4, 3, 6, 6, device="cuda")

    def iterate(net, ft):
        ft.zero_grad(set_to_none=False)
        net(x).square().mean().backward()
        ft.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for net, ft in zip(nets, fts, strict=True):
            for _ in range(3):
                iterate(net, ft)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate(nets[0], fts[0])
    for i in range(5):
        x.copy_(data(4, seed=i, dtype=torch.float32))
        for ft in fts:
            ft.param_groups[0]["lr"].fill_(1e-3 * (i + 1))
        graph.replay()
        iterate(nets[1], fts[1])
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert fts[0].state[fts[0].parameters()[0]]["step"].tolist() == [8, 8, 8]
    fts[0].zero_grad(set_to_none=True)

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            nets[0](x).square().mean().backward()
            fts[0].step()

    with pytest.raises(RuntimeError, match="set_to_none=False"):
        capture()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.skipif(backends()["row_update"] == ["reference"], reason="the reference does ask")
def test_no_step_asks_the_device_for_a_number(device, monkeypatch):
    net = build("mlp").float().to(device)
    ft = SparseFinetuner(net, lr=1e-2)
    ft.select(ROWS)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    for i in range(2):
        ft.zero_grad()
        scaler.scale(net(data(dtype=torch.float32).to(device)).square().mean()).backward()
        if i:  # the first step makes the state
            monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("item() in a step"))
        ft.found_inf, ft.grad_scale = torch.zeros(1, device=device), torch.full((1,), 4.0, device=device)
        ft.step()
