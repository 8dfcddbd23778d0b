"""The percentile bootstrap against its definition and its coverage."""

import numpy as np
import pytest
import torch

from minegan_fast.metrics import bootstrap, fid, kid, kmmd


def features(n, d=2, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def mean_difference(x, y):
    return (x.mean() - y.mean()).item()


def test_is_the_percentile_interval_of_seeded_resamples():
    x, y = features(12), features(9, seed=1)
    generator = torch.Generator().manual_seed(3)
    values = []
    for _ in range(50):
        rows, columns = (torch.randint(n, (n,), generator=generator) for n in (12, 9))
        values.append(mean_difference(x[rows], y[columns]))
    low, high = bootstrap(mean_difference, x, y, samples=50, seed=3, level=0.9)
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.05, 0.95])), rel=1e-12)
    assert type(low) is type(high) is float
    assert bootstrap(mean_difference, x, y, 50, seed=3, level=0.9) == (low, high)
    assert bootstrap(mean_difference, x, y, 50, seed=4, level=0.9) != (low, high)
    wider = bootstrap(mean_difference, x, y, 50, seed=3, level=0.99)
    assert wider[0] < low < high < wider[1]


def test_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        low, high = bootstrap(mean_difference, features(40, seed=seed, shift=1), features(40, seed=seed + 500))
        covered += low <= 1 <= high
    # Binomial with p = 0.95 has a deviation of 2.2; percentile intervals cover somewhat less than they say.
    assert 88 <= covered <= 100


def test_separates_near_from_far():
    real = features(60)
    near = bootstrap(kmmd, features(60, seed=1, shift=0.2), real, samples=50)
    far = bootstrap(kmmd, features(60, seed=2, shift=1.5), real, samples=50)
    assert near[1] < far[0]


def test_takes_every_metric_and_arrays():
    x, y = features(30).numpy(), features(30, seed=1, shift=1).numpy()
    for metric in (fid, kmmd, lambda a, b: kid(a, b, subset_size=30)):
        low, high = bootstrap(metric, x, y, samples=20)
        assert 0 < low < high


def test_wrong_options_are_named():
    x = features(5)
    with pytest.raises(ValueError, match=r"samples >= 2 and 0 < level < 1, got 1 and 0.95"):
        bootstrap(kmmd, x, x, samples=1)
    with pytest.raises(ValueError, match=r"0 < level < 1, got 200 and 1.0"):
        bootstrap(kmmd, x, x, level=1.0)
    with pytest.raises(ValueError, match="same number of dimensions"):
        bootstrap(kmmd, x, features(5, 3))
