"""One step is torch.optim's, to the bit."""

import pytest
import torch

from minegan_fast.finetune.update import carry, update


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("adam", torch.optim.Adam, {"betas": (0.0, 0.99), "eps": 1e-8}),
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999), "eps": 1e-3}),
        ("adamw", torch.optim.AdamW, {"betas": (0.5, 0.9), "eps": 1e-8}),
        ("sgd", torch.optim.SGD, {"momentum": 0.0}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_equals_torch_to_the_bit(name, make, options, decay, dtype):
    ours = torch.randn(5, 33).to(dtype)
    theirs = ours.clone().requires_grad_()
    optimizer = make([theirs], lr=1e-2, weight_decay=decay, foreach=False, **options)
    group = {"lr": 1e-2, "weight_decay": decay, "momentum": 0.0, **options}
    state = {}
    for _ in range(6):
        grad = torch.randn(5, 33).to(dtype)
        theirs.grad = grad.clone()
        optimizer.step()
        update(name, ours, grad, state, group, per_row=True)
        assert torch.equal(ours, theirs)
    if name != "sgd":
        assert torch.equal(state["exp_avg_sq"], optimizer.state[theirs]["exp_avg_sq"])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_rows_of_different_age(name):
    """A row that joins after three steps goes on as if it had been alone."""
    group = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9}
    start = torch.randn(3, 4, 2, dtype=torch.float64)
    grads = torch.randn(6, 3, 4, 2, dtype=torch.float64)
    alone = {}
    for row, first in ((0, 0), (2, 3)):
        alone[row] = start[row : row + 1].clone()
        state = {}
        for t in range(first, 6):
            update(name, alone[row], grads[t, row : row + 1], state, group, per_row=True)
    leaf, state = start[[0, 1]].clone(), {}
    for t in range(3):
        update(name, leaf, grads[t, [0, 1]], state, group, per_row=True)
    joined = torch.cat([leaf[:1], start[2:]])
    state = carry({**state, "ema": leaf * 2}, torch.tensor([0, 1]), torch.tensor([0, 2]), joined)
    assert torch.equal(state.pop("ema"), torch.cat([leaf[:1] * 2, start[2:]]))
    for t in range(3, 6):
        update(name, joined, grads[t, [0, 2]], state, group, per_row=True)
    # vectors of bias corrections round once more than torch's scalars
    torch.testing.assert_close(joined, torch.cat([alone[0], alone[2]]), rtol=1e-14, atol=0)


def test_zero_dimensional_parameter():
    p, q = torch.tensor(2.0), torch.tensor(2.0, requires_grad=True)
    optimizer, state = torch.optim.Adam([q], lr=0.1), {}
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    for g in (1.0, -3.0):
        q.grad = torch.tensor(g)
        optimizer.step()
        update("adam", p, torch.tensor(g), state, group, per_row=False)
    assert torch.equal(p, q)
