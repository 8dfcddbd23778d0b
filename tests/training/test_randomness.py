"""Random numbers by seed and purpose: what sets the random state, and what leaves it alone."""

import pytest
import torch

from minegan_fast.training.randomness import (
    DataOrder,
    derived_seed,
    keep_and_set_random_state,
    keep_random_state,
    set_random_state,
)


def test_what_sets_the_random_state_and_what_keeps_it():
    torch.manual_seed(5)
    with keep_random_state(torch.device("cpu")):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), inside), "the block drew from the caller's state, which came back"
    torch.manual_seed(5)
    with keep_and_set_random_state(1, "miner"):
        drawn = torch.rand(3)
    assert torch.equal(torch.rand(3), inside)
    set_random_state(1, "miner")
    assert torch.equal(torch.rand(3), drawn)
    set_random_state(1, "critic")
    assert not torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (3, 8), (5, 5), (2, 1)])
def test_data_order_visits_every_sample_once_a_pass(n, batch):
    order = DataOrder(n, batch, seed=1)
    flat = torch.cat([order[k] for k in range(2 * n)])
    for start in range(0, len(flat) - n + 1, n):
        assert sorted(flat[start : start + n].tolist()) == list(range(n))
    assert torch.equal(DataOrder(n, batch, seed=1)[7], order[7])


def test_seeds_differ_by_seed_and_purpose():
    assert len({derived_seed(0, "a", 1), derived_seed(0, "a", 2), derived_seed(1, "a", 2)}) == 3
