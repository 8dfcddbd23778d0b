"""Precision and recall against loops over samples, against a k-nearest-neighbour search, and by hand."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minegan_fast.metrics import precision_recall

pytestmark = pytest.mark.filterwarnings("ignore:.*precision and recall have errors")


def features(n, d=8, seed=0, shift=0.0, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def brute(x, y, k):
    """Eq. 1 and 2 of the paper, a pair at a time."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def covered(points, centers):
        radii = [
            sorted(np.sqrt(((c - other) ** 2).sum()) for j, other in enumerate(centers) if j != i)[k - 1]
            for i, c in enumerate(centers)
        ]
        inside = [any(np.sqrt(((p - c) ** 2).sum()) <= r for c, r in zip(centers, radii, strict=True)) for p in points]
        return np.mean(inside)

    return covered(x, y), covered(y, x)


@pytest.mark.parametrize("tile", [1 << 21, 50])
@pytest.mark.parametrize(("n", "m", "k"), [(40, 30, 3), (30, 40, 1), (4, 9, 3), (2, 2, 1), (25, 31, 24)])
def test_matches_brute_force(n, m, k, tile, monkeypatch):
    monkeypatch.setattr("minegan_fast.metrics._points.TILE", tile)
    for d, shift in ((1, 1.0), (3, 0.7), (20, 0.4)):
        x, y = features(n, d, shift=shift), features(m, d, seed=1, scale=1.3)
        values = precision_recall(x, y, k)
        assert [type(value) for value in values] == [float, float]
        assert values == brute(x, y, k)


def test_matches_a_neighbour_search():
    # The published implementations: the radius is the (k + 1)-th of the sorted distances, the first being its own.
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = features(300, 5, shift=0.8).numpy(), features(250, 5, seed=1).numpy()
    expected = []
    for points, centers in ((x, y), (y, x)):
        radii = neighbors.NearestNeighbors(n_neighbors=4).fit(centers).kneighbors(centers)[0][:, 3]
        distances = np.linalg.norm(points[:, None] - centers, axis=2)
        expected.append((distances <= radii).any(1).mean())
    assert precision_recall(x, y) == tuple(expected)
    assert 0.1 < min(expected) < max(expected) < 0.95


def test_by_hand():
    y = torch.tensor([[0.0], [1.0], [3.0]])  # k = 1: radii 1, 1, 2: [-1, 1], [0, 2], [1, 5]
    x = torch.tensor([[-1.0], [5.0], [5.5], [-1.5]])  # radii 0.5, 0.5, 0.5, 0.5: none reaches a real
    assert precision_recall(x, y, k=1) == (0.5, 0.0)  # both surfaces belong to the balls


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(2, 25), m=st.integers(2, 25), d=st.integers(1, 4), side=st.integers(1, 4), seed=st.integers(0, 999)
)
def test_ties_on_a_lattice_are_exact(n, m, d, side, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(side, (count, d), generator=generator).double() for count in (n, m))
    for k in {1, min(n, m) // 2, min(n, m) - 1} - {0}:
        expected = brute(x, y, k)
        assert precision_recall(x, y, k) == expected
        # Powers of two and an origin far away keep every difference; the mean that is taken off does not.
        assert precision_recall(x * 0.125 + 2.0**20, y * 0.125 + 2.0**20, k) == expected


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 60), m=st.integers(4, 60), d=st.integers(1, 40), seed=st.integers(0, 999))
def test_properties(n, m, d, seed):
    x, y = features(n, d, seed, shift=0.5), features(m, d, seed + 1)
    precision, recall = precision_recall(x, y)
    assert precision_recall(y, x) == (recall, precision)
    assert precision_recall(x.flip(0), y.flip(1).flip(1)) == (precision, recall)
    assert precision_recall(4 * x, 4 * y) == (precision, recall)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x + 1000, y) == (0.0, 0.0)
    larger = precision_recall(x, y, k=min(n, m) - 1)
    assert larger[0] >= precision
    assert larger[1] >= recall


def test_copies_of_a_collapsed_sample():
    y = features(1, 64).expand(30, 64) + 1e6
    assert precision_recall(y[:10], y) == (1.0, 1.0)  # radii are 0, distances too
    assert precision_recall(y[:10] + 1e-3, y) == (0.0, 0.0)
    memorised = torch.cat([y[:5], features(5, 64)])
    assert precision_recall(memorised, y)[0] == 0.5


def test_a_collapsed_generator_is_precise_without_recall():
    real = features(300, 6)
    collapsed = real[:1] + 1e-3 * features(300, 6, seed=1)
    precision, recall = precision_recall(collapsed, real)
    assert precision == 1.0
    assert recall <= 1 / 300


def test_float32_and_arrays():
    x, y = features(40, shift=0.5).float(), features(30, seed=1).float()
    expected = precision_recall(x.double(), y.double())
    assert precision_recall(x, y) == expected
    assert precision_recall(x.numpy(), y.double()) == expected


@pytest.mark.filterwarnings("error")
def test_warns_once_of_few_samples():
    with pytest.warns(UserWarning, match="^x has 99 and y has 20 samples: with fewer than 100 precision") as caught:
        precision_recall(features(99), features(20))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision_recall(features(100), features(100))


@pytest.mark.parametrize(
    ("x", "y", "k", "error", "message"),
    [
        (features(3), features(9), 3, ValueError, r"x has 3 sample\(s\), 3 nearest others need at least 4"),
        (features(9), features(5), 5, ValueError, r"y has 5 sample\(s\).* need at least 6"),
        (features(9), features(9), 0, ValueError, "k must be at least 1, got 0"),
        (features(0), features(9), 3, ValueError, "x must be"),
        (features(9), features(9, 7), 3, ValueError, "same number of dimensions, got 8 and 7"),
        (features(9).long(), features(9), 3, TypeError, "x holds torch.int64"),
        (features(9), torch.full((9, 8), float("nan")), 3, ValueError, "y holds NaN or inf in 9 of 9 rows"),
    ],
)
def test_wrong_arguments_are_named(x, y, k, error, message):
    with pytest.raises(error, match=message):
        precision_recall(x, y, k)


@pytest.mark.gpu
def test_on_a_gpu():
    x, y = features(300, 40, shift=0.3), features(250, 40, seed=1)
    assert precision_recall(x.cuda(), y.cuda()) == precision_recall(x, y)
    lattice = [(4 * z).round() for z in (x[:, :2], y[:, :2])]
    assert precision_recall(*(z.cuda() for z in lattice)) == brute(*lattice, 3)
    with pytest.raises(ValueError, match="x and y must be on the same device, got cuda:0 and cpu"):
        precision_recall(x.cuda(), y)
