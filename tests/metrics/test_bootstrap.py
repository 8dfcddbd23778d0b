"""The percentile bootstrap against its definition and its coverage."""

import numpy as np
import pytest
import torch

from minegan_fast.metrics import bootstrap, diversity, fid, kid, kmmd, mean_variance, precision_recall
from minegan_fast.ops import mmd2


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


@pytest.mark.filterwarnings("ignore:.*precision and recall")
def test_takes_every_metric_and_arrays():
    def kid_of_all(a, b):
        return mmd2(a, b, kernel="polynomial")

    x, y = features(30).numpy(), features(30, seed=1, shift=1).numpy()
    two = {
        "percentile": (fid, kmmd, lambda a, b: kid(a, b, subset_size=30), precision_recall),
        "jackknife": (fid, kmmd, kid_of_all),
    }
    for method, metrics in two.items():
        for metric in metrics:
            low, high = bootstrap(metric, x, y, samples=20, method=method)
            assert low < high
            assert high > 0
            assert type(low) is type(high) is float
        for metric in (mean_variance, diversity):
            low, high = bootstrap(metric, x, samples=20, method=method)
            assert 0 < low < metric(x) < high


def test_one_sample_is_resampled_alone():
    x = features(12)
    generator = torch.Generator().manual_seed(3)
    values = [mean_variance(x[torch.randint(12, (12,), generator=generator)]) for _ in range(50)]
    low, high = bootstrap(mean_variance, x, samples=50, seed=3)
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), rel=1e-12)


def test_the_jackknife_of_means_is_their_standard_error():
    x, y = features(12, 1), features(9, 1, seed=1)
    error = (x.var() / 12 + y.var() / 9).item() ** 0.5
    for level, width in ((0.95, 1.959964), (0.68, 0.994458)):
        low, high = bootstrap(mean_difference, x, y, level=level, method="jackknife")
        assert (low + high) / 2 == pytest.approx(mean_difference(x, y), rel=1e-12)
        assert (high - low) / 2 == pytest.approx(width * error, rel=1e-6)


def test_the_jackknife_of_a_kernel_distance_lies_around_the_truth_and_the_percentiles_above():
    def metric(x, y):
        xx, yy, xy = (torch.exp(-(a[:, None] - b).square().sum(2) / 2) for a, b in ((x, x), (y, y), (x, y)))
        return sum((k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy)) - 2 * xy.mean()

    # E exp(-|a - b|^2 / 2) of normal a and b whose means are s apart is 3^(-D/2) exp(-|s|^2 / 6).
    truth = 2 / 3 * (1 - np.exp(-2 / 6))
    covered, middles = 0, {"jackknife": [], "percentile": []}
    for seed in range(100):
        x, y = features(20, seed=seed, shift=1), features(20, seed=seed + 500)
        for method, values in middles.items():
            low, high = bootstrap(metric, x, y, samples=40, method=method)
            values.append((low + high) / 2)
            covered += method == "jackknife" and low <= truth <= high
    assert 88 <= covered <= 100
    deviation = np.std(middles["jackknife"]) / 10
    assert np.mean(middles["jackknife"]) == pytest.approx(truth, abs=3 * deviation)
    # The copies on the diagonal: 1/20 of each of both samples' pairs, where the mean of a pair is 1/3.
    assert np.mean(middles["percentile"]) == pytest.approx(truth + 2 * (1 - 1 / 3) / 20, abs=4 * deviation)


@pytest.mark.parametrize("method", ["percentile", "jackknife"])
def test_warns_once(method):
    with pytest.warns(UserWarning, match="rank-deficient") as caught:
        bootstrap(fid, features(6, 8), features(7, 8, seed=1), samples=5, method=method)
    assert len(caught) == 1


def test_wrong_options_are_named():
    x = features(5)
    with pytest.raises(ValueError, match=r"samples >= 2 and 0 < level < 1, got 1 and 0.95"):
        bootstrap(kmmd, x, x, samples=1)
    with pytest.raises(ValueError, match=r"0 < level < 1, got 200 and 1.0"):
        bootstrap(kmmd, x, x, level=1.0)
    with pytest.raises(ValueError, match="unknown method 'bca': one of percentile, jackknife"):
        bootstrap(kmmd, x, x, method="bca")
    for metric in (kid, precision_recall):
        with pytest.raises(ValueError, match=f"the jackknife says nothing of {metric.__name__}"):
            bootstrap(metric, x, x, method="jackknife")
    with pytest.raises(ValueError, match="same number of dimensions"):
        bootstrap(kmmd, x, features(5, 3))
    with pytest.raises(ValueError, match="x holds NaN"):
        bootstrap(mean_variance, x * torch.nan)


@pytest.mark.filterwarnings("ignore:x has")
def test_errors_of_resamples_say_so():
    x = features(3)
    with pytest.raises(
        ValueError, match=r"median distance is 0.*resample with replacement; method='jackknife' takes none"
    ):
        bootstrap(kmmd, x, x)
    with pytest.raises(ValueError, match=r"x has 1 sample.*with one left out"):
        bootstrap(kmmd, x[:2], x, method="jackknife")
