"""Checks of features, and their median distance against a brute force over all pairs."""

import numpy as np
import pytest
import torch

from minegan_fast.ops._features import check_finite, median_distance


def sample(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_median(z, order):
    return np.median([np.linalg.norm(z[i] - z[j], ord=order) for i in range(len(z)) for j in range(i + 1, len(z))])


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("n", [2, 3, 4, 9])
@pytest.mark.parametrize("D", [3, 40])
def test_median_distance(n, p, D):
    x = sample(n, D) + 100
    assert median_distance(x, p) == pytest.approx(brute_median(x.numpy(), p), rel=1e-11)


def test_median_distance_of_many_rows_is_estimated_reproducibly():
    x = sample(4200, 2)
    exact = torch.nn.functional.pdist(x).median().item()
    assert median_distance(x) == median_distance(x)
    assert median_distance(x) == pytest.approx(exact, rel=5e-3)


def test_a_sum_that_overflows_is_not_taken_for_infinite_features():
    check_finite(torch.full((4, 3), 2e38), "x")
