"""Two processes select and train as one."""

import pytest
import ranks
import torch
from sample_networks import build, data

from minegan_fast.finetune import SparseFinetuner

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch is built without torch.distributed"
)
STEPS = {
    "before": (5, 4),
    "before, model given": (5, 4),
    "after": (3, 4),
    "begun by one": (3, 4),
    "accumulation": (4, 12),
    "around, before": (4, 8),
    "around, after": (4, 8),
}


def alone(name: str, until: int | None = None):
    """What the two processes do, on one: a network and its optimizer."""
    net = build("mlp")
    ft = SparseFinetuner(net, score_steps=2, **ranks.ARGUMENTS)
    model, others = net, []
    if name.startswith("around"):
        ft.select({"1.weight": [0, 2], "3.weight": [1]})
        model = ranks.Around(net)
        others = [torch.optim.SGD([model.scale], lr=1e-2)]
    if name in ("after", "begun by one"):
        with ft.scoring():
            for x in data(4, seed=3).split(1):
                net(x).square().mean().backward()
        ft.select()
    steps, batch = STEPS[name]
    for i in range(until or steps):
        for other in others:
            other.zero_grad()
        ranks.step(model, ft, data(batch, seed=i))
        for other in others:
            other.step()
    return net, ft


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left their results."""
    folder = tmp_path_factory.mktemp("ranks")
    net, ft = alone("after", until=2)
    torch.save((net.state_dict(), ft.state_dict()), folder / "one.pt")
    torch.multiprocessing.spawn(ranks.main, (str(folder),), nprocs=2)
    return folder


def assert_same_weights(state: dict, other: dict):
    for key, value in other.items():
        # means of two halves against the mean of the whole, in float64
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_equal_one(folder, name):
    state, rows, scores = torch.load(folder / "results.pt", weights_only=True)[name]
    net, ft = alone(name)
    assert {n: r.tolist() for n, r in rows.items()} == {n: r.tolist() for n, r in ft.selection.rows.items()}
    for layer in scores:
        torch.testing.assert_close(scores[layer], ft.scores()[layer], rtol=1e-6, atol=0)
    assert_same_weights(state, net.state_dict())


@pytest.mark.parametrize("criterion", ["agreement", "contrast"])
def test_evidence_of_two_processes_is_that_of_one(folder, criterion):
    _, rows, scores = torch.load(folder / "results.pt", weights_only=True)[criterion]
    _, expected_rows, expected = ranks.by_sample(criterion, lambda x: x)
    assert {n: r.tolist() for n, r in rows.items()} == {n: r.tolist() for n, r in expected_rows.items()}
    for layer, score in expected.items():
        torch.testing.assert_close(scores[layer], score, rtol=1e-6, atol=0)


def test_one_process_goes_on_where_two_stopped(folder):
    state, optimizer = torch.load(folder / "two.pt", weights_only=True)
    net = build("mlp")
    ft = SparseFinetuner(net, **ranks.ARGUMENTS)
    net.load_state_dict(state)
    ft.load_state_dict(optimizer)
    ranks.step(net, ft, data(4, seed=2))
    ft.verify()
    assert_same_weights(net.state_dict(), torch.load(folder / "results.pt", weights_only=True)["after"][0])
