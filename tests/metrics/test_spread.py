"""Mean variance, diversity and nearest neighbours against loops over samples."""

import numpy as np
import pytest
import torch

from minegan_fast.metrics import diversity, mean_variance, nearest


def features(n, d=3, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mean_variance():
    x = features(12)
    expected = np.mean([np.var(column, ddof=1) for column in x.numpy().T])
    assert type(mean_variance(x)) is float
    assert mean_variance(x) == pytest.approx(expected, rel=1e-12)
    assert mean_variance(x.numpy() * 2 + 100) == pytest.approx(4 * expected, rel=1e-9)
    assert mean_variance(torch.tensor([[0.0, 1.0], [2.0, 1.0]])) == 1.0
    # Half the mean squared distance between two samples, per dimension.
    pairs = [((x[i] - x[j]) ** 2).sum().item() for i in range(12) for j in range(i)]
    assert expected == pytest.approx(np.mean(pairs) / 2 / 3, rel=1e-12)


@pytest.mark.parametrize("tile", [1 << 21, 20])
def test_diversity(tile, monkeypatch):
    monkeypatch.setattr("minegan_fast.metrics._points.TILE", tile)
    for n in (2, 11, 60):
        x = features(n)
        expected = np.mean([np.linalg.norm(x[i] - x[j]) for i in range(n) for j in range(i)])
        assert type(diversity(x)) is float
        assert diversity(x) == pytest.approx(expected, rel=1e-9)
        assert diversity(3 * x.numpy() + 10) == pytest.approx(3 * expected, rel=1e-9)


def test_a_collapsed_sample_has_no_spread():
    x = torch.full((40, 5), 7.3)
    assert mean_variance(x) == pytest.approx(0, abs=1e-20)
    assert diversity(x) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("tile", [1 << 21, 20])
def test_nearest(tile, monkeypatch):
    monkeypatch.setattr("minegan_fast.metrics._points.TILE", tile)
    x, y = features(40), features(30, seed=1)
    distance, index = nearest(x, y)
    every = np.array([[np.linalg.norm(a - b) for b in y.numpy()] for a in x.numpy()])
    assert index.tolist() == every.argmin(1).tolist()
    torch.testing.assert_close(distance, torch.from_numpy(every.min(1)), rtol=1e-12, atol=0)


def test_a_copy_is_at_distance_zero_exactly():
    y = features(50, 64) + 1e8
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    distance, index = nearest(y[order], y)
    assert torch.equal(distance, torch.zeros(50, dtype=torch.float64))
    assert torch.equal(index, order)


def test_a_copy_is_found_among_near_copies():
    # Closer than products of such norms tell apart.
    y = 1e3 * features(1, 16) + 1e-9 * features(50, 16, seed=1)
    y = torch.cat([y, 1e3 * features(10, 16, seed=2)])
    distance, index = nearest(y, y)
    assert index.tolist() == list(range(60))
    assert torch.equal(distance, torch.zeros(60, dtype=torch.float64))
    shifted = y + 1e-10
    every = (shifted[:, None] - y).square().sum(2)
    assert nearest(shifted, y)[1].tolist() == every.argmin(1).tolist()


def test_wrong_features_are_named():
    for metric in (mean_variance, diversity):
        with pytest.raises(ValueError, match="x has 1 sample"):
            metric(features(1))
        with pytest.raises(TypeError, match=r"x holds torch\.int64"):
            metric(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="same number of dimensions, got 3 and 2"):
        nearest(features(2), features(2, 2))
    with pytest.raises(ValueError, match="y must be"):
        nearest(features(2), features(0))
    with pytest.raises(ValueError, match="x holds NaN or inf in 1 of 2 rows, the first is row 1"):
        nearest(torch.tensor([[0.0], [float("nan")]]), torch.ones(1, 1))


def test_float32_features_are_computed_in_float64():
    x, y = features(30, 6).float() + 1000, features(20, 6, seed=1).float() + 1000
    assert mean_variance(x) == mean_variance(x.double())
    assert diversity(x) == diversity(x.double())
    distance, index = nearest(x, y)
    assert distance.dtype == torch.float64
    assert torch.equal(distance, nearest(x.double(), y.double())[0])
    assert torch.equal(index, nearest(x.double(), y.double())[1])


@pytest.mark.gpu
def test_on_a_gpu():
    x, y = features(80, 6), features(70, 6, seed=1)
    assert mean_variance(x.cuda()) == pytest.approx(mean_variance(x), rel=1e-12)
    assert diversity(x.cuda()) == pytest.approx(diversity(x), rel=1e-9)
    distance, index = nearest(x.cuda(), y.cuda())
    assert index.tolist() == nearest(x, y)[1].tolist()
    torch.testing.assert_close(distance.cpu(), nearest(x, y)[0], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="x and y must be on the same device, got cpu and cuda:0"):
        nearest(x, y.cuda())
