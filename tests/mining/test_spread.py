"""Generators on two processes make what those of one process make: images, gradients, shares; and fail together."""

import socket

import pytest
import spread_ranks
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch is built without torch.distributed"
)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes has found. They have checked that they fail together."""
    folder = tmp_path_factory.mktemp("spread")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(spread_ranks.main, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_close(one, other, exact=False):
    """exact: the bits, else to rounding."""
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize("name", spread_ranks.CASES)
def test_mining_is_that_of_one_process(two, name, part):
    one = spread_ranks.steps(spread_ranks.CASES[name], None, part)
    for rank, both in enumerate(two):
        found = both[name, part]
        for key, value in one.items():
            if name == "constants" and key in ("another", "random state"):
                continue  # these generators have drawn, which is no part of what is the same
            if key.startswith("generators"):
                value = {i: gradients for i, gradients in value.items() if i % 2 == rank}
            assert_close(found[key], value)
    for key in one:
        if not key.startswith("generators"):
            assert_close(two[0][name, part][key], two[1][name, part][key], exact=True)


def test_every_branch_and_both_ranks_have_a_part(two):
    for name in spread_ranks.CASES.keys() - {"single"}:
        winners = torch.cat([two[0][name, False][f"who {step}"] for step in range(3)])
        assert len({int(i) % 2 for i in winners}) == 2


def test_a_mixture_is_that_of_one_process(two):
    one = spread_ranks.mixture(None)
    for found in two:
        assert_close(found["mixture"], one)
    assert_close(two[0]["mixture"], two[1]["mixture"], exact=True)
    assert any((one[f"p {step}"] == 0).any() for step in range(5)), "a branch without a share sends nothing"


@pytest.mark.parametrize("what", ["noise", "apart"])
def test_the_ranks_agree(two, what):
    """Also where generators draw, or the ranks do not draw the same."""
    assert_close(two[0][what], two[1][what], exact=True)


def test_a_group_of_the_callers(two):
    assert_close(two[0]["a group"], two[0]["plain", True], exact=True)
