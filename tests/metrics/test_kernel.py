"""KID and KMMD against torchmetrics' estimator, brute force, and what their definitions promise."""

import warnings

import numpy as np
import pytest
import torch

from minegan_fast.metrics import kid, kmmd
from minegan_fast.ops import mmd2


def features(n, d=8, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def brute_polynomial_mmd2(x, y):
    x, y = x.numpy(), y.numpy()
    k = [(a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = [(m.sum() - np.trace(m)) / (len(m) * (len(m) - 1)) for m in k[:2]]
    return sum(within) - 2 * k[2].mean()


def test_kid_of_whole_samples_equals_torchmetrics():
    poly_mmd = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    x, y = features(60), features(60, seed=1, shift=0.3)
    mean, std = kid(x, y, subsets=7, subset_size=60)
    assert mean == pytest.approx(poly_mmd(x, y).item(), rel=1e-10)
    assert std == 0.0


def test_kid_is_mean_and_population_deviation_over_seeded_subsets():
    x, y = features(40), features(30, seed=1, shift=0.3)
    draws = np.random.RandomState(5)
    values, drawn = [], []
    for _ in range(9):
        rows, columns = (draws.choice(n, 12, replace=False) for n in (40, 30))
        drawn.append((rows, columns))
        values.append(brute_polynomial_mmd2(x[rows], y[columns]))
    mean, std = kid(x, y, subsets=9, subset_size=12, seed=5)
    assert mean == pytest.approx(np.mean(values), rel=1e-10)
    assert std == pytest.approx(np.std(values), rel=1e-10)
    assert kid(x, y, 9, 12, seed=5) == (mean, std)
    indices = tuple(np.stack(part) for part in zip(*drawn, strict=True))
    assert kid(x, y, indices=indices) == (mean, std)
    assert kid(x, y, 9, 12, seed=6)[0] != mean


@pytest.mark.parametrize("subsets", [3, 60], ids=["one_at_a_time", "all_pairs_once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kid_of_either_way_is_torchmetrics_on_the_same_subsets(subsets, dtype):
    poly_mmd = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    x, y = features(50, 20).abs().to(dtype), features(60, 20, seed=1).abs().to(dtype)
    draws = np.random.RandomState(7)
    values = []
    for _ in range(subsets):
        rows, columns = draws.choice(50, 15, replace=False), draws.choice(60, 15, replace=False)
        values.append(poly_mmd(x[rows].double(), y[columns].double()).item())
    mean, std = kid(x, y, subsets, 15, seed=7)
    near = {"rel": 1e-3, "abs": 1e-8} if dtype == torch.float32 else {"rel": 1e-10, "abs": 1e-14}
    assert mean == pytest.approx(np.mean(values), **near)
    assert std == pytest.approx(np.std(values), **near)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ((np.zeros((2, 3), int), np.zeros((2, 4), int)), "of one shape"),
        ((np.zeros((2, 1), int), np.zeros((2, 1), int)), "subset_size >= 2"),
        ((np.zeros((2, 3)), np.zeros((2, 3))), "int64"),
        ((np.full((2, 3), 9), np.zeros((2, 3), int)), r"of x must lie in 0..8, got 9..9"),
        ((np.zeros((2, 3), int), np.full((2, 3), -1)), r"of y must lie in 0..6, got -1..-1"),
    ],
)
def test_wrong_indices_are_named(indices, message):
    with pytest.raises(ValueError, match=message):
        kid(features(9), features(7), indices=indices)


def test_kid_subsets_are_drawn_without_replacement():
    # All kernels are 1 but that of the odd row with itself, which is on the diagonal unless the row is drawn twice.
    x, y = torch.zeros(2, 12, 1, dtype=torch.float64)
    x[4] = 10
    mean, deviation = kid(x, y, subsets=50, subset_size=11)
    assert mean == pytest.approx(0, abs=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("metric", [kid, kmmd])
def test_a_handful_of_samples_warns(metric):
    x, y = features(9), features(30, seed=1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        metric(x, y)
    assert any("varies by as much as it measures" in str(w.message) for w in seen)


@pytest.mark.parametrize(("n", "m"), [(20, 50), (50, 20)])
def test_subset_size_falls_to_the_smaller_sample_with_a_warning(n, m):
    x, y = features(n), features(m, seed=1)
    with pytest.warns(UserWarning, match="subset_size 1000 is more than the smaller sample has: 20 is used"):
        value = kid(x, y, subsets=5)
    assert value == kid(x, y, subsets=5, subset_size=20)
    assert value[1] > 0


def test_kid_is_unbiased_and_grows_with_the_distance():
    values = [kid(features(30, seed=s), features(30, seed=s + 900), subset_size=30)[0] for s in range(100)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 10
    x = features(200)
    far = [kid(x, features(200, seed=1, shift=shift), 5, 100)[0] for shift in (0.0, 0.3, 0.6, 1.2)]
    assert far == sorted(far)
    assert far[3] > 1


def brute_kmmd(x, y, sigma):
    median = np.median([np.linalg.norm(y[i] - y[j]) for i in range(len(y)) for j in range(i + 1, len(y))])
    k = [np.exp(-((a[:, None] - b) ** 2).sum(2) / (2 * (sigma * median) ** 2)) for a, b in ((x, x), (y, y), (x, y))]
    within = [(m.sum() - np.trace(m)) / (len(m) * (len(m) - 1)) for m in k[:2]]
    return sum(within) - 2 * k[2].mean()


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3])
def test_kmmd_matches_brute_force(sigma):
    x, y = features(17, shift=0.5), 2 * features(12, seed=1)
    value = kmmd(x, y, sigma)
    assert isinstance(value, float)
    assert value == pytest.approx(brute_kmmd(x.numpy(), y.numpy(), sigma), rel=1e-10)
    # The bandwidth is of the reals: the order of the arguments matters.
    assert kmmd(y, x, sigma) != pytest.approx(value, rel=1e-3)


def test_kmmd_does_not_depend_on_units_or_origin():
    x, y = features(20, shift=0.5), features(25, seed=1)
    assert kmmd(100 * x + 7, 100 * y + 7) == pytest.approx(kmmd(x, y), rel=1e-9)


def test_kmmd_is_the_mmd2_of_its_bandwidth():
    x, y = features(20), features(30, seed=1)
    median = torch.nn.functional.pdist(y)
    median = (median.sort().values[[217, 217]]).mean().item()
    assert kmmd(x, y, 2.0) == pytest.approx(mmd2(x, y, bandwidth=2 * median).item(), rel=1e-12)


@pytest.mark.parametrize("convert", [torch.Tensor.float, torch.Tensor.numpy, lambda x: x.float().numpy()])
def test_tensors_and_arrays_of_any_float_type(convert):
    x, y = features(20), features(30, seed=1, shift=0.5)
    for metric in (kmmd, lambda a, b: kid(a, b, 3, 10)[0]):
        value = metric(convert(x), convert(y))
        assert type(value) is float
        assert value == pytest.approx(metric(x, y), rel=1e-5)


def test_no_gradient_is_kept():
    x = features(20).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(kmmd(x, features(20, seed=1))) is float


X = features(4)


@pytest.mark.parametrize("metric", [kid, kmmd])
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X[:1], X, ValueError, r"x has 1 sample\(s\), this metric needs at least 2"),
        (X, X[:1], ValueError, r"y has 1 sample\(s\), this metric needs at least 2"),
        (X, X[:, :3], ValueError, "same number of dimensions, got 8 and 3"),
        (X[:0], X, ValueError, "x must be"),
        (X.view(2, 2, 8), X, ValueError, r"x must be \[samples, dimensions\]"),
        (torch.zeros(4, 8, dtype=torch.uint8), X, TypeError, "images go through a feature extractor first"),
        (X, X.numpy().astype(int), TypeError, "y holds torch.int64"),
        (X, torch.full((4, 8), float("nan")), ValueError, "y holds NaN or inf in 4 of 4 rows, the first is row 0"),
    ],
)
def test_wrong_features_are_named(metric, x, y, error, message):
    with pytest.raises(error, match=message):
        metric(x, y)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="subsets >= 1 and subset_size >= 2, got 0 and 1000"):
        kid(X, X, subsets=0)
    with pytest.raises(ValueError, match="subset_size >= 2, got 100 and 1"):
        kid(X, X, subset_size=1)
    for sigma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma must be a finite number > 0"):
            kmmd(X, X, sigma)
    with pytest.raises(ValueError, match=r"median distance is 0.*the reals, y, have to differ"):
        kmmd(X, torch.zeros(5, 8))


@pytest.mark.parametrize("metric", [kid, kmmd])
@pytest.mark.filterwarnings("ignore:subset_size")
def test_features_whose_distance_overflows_are_named(metric):
    x = features(12).float()
    with pytest.raises(ValueError, match="leaves the range of torch"):
        metric(x * 1e20, x * 2e20)


@pytest.mark.filterwarnings("ignore:x has", "error:The given NumPy array")
def test_arrays_that_torch_does_not_take_are_copied():
    frozen = X.numpy().copy()
    frozen.flags.writeable = False
    expected = kmmd(X, X.flip(0))
    for x in (frozen, frozen[:, ::-1][:, ::-1], X.numpy().astype(">f8")):
        assert kmmd(x, X.numpy()[::-1]) == expected


@pytest.mark.parametrize("x", [[X[0], X[1]], "x.pt", np.array([[None, 1.0]])], ids=["list", "path", "objects"])
def test_what_is_no_array_is_named(x):
    with pytest.raises(TypeError, match=r"x must be a tensor or array of numbers, not (list|str|an array of object)"):
        kmmd(x, X)


@pytest.mark.parametrize("subsets", [3, 60], ids=["one_at_a_time", "all_pairs_once"])
def test_kid_is_torch_fidelitys_for_its_seed(subsets):
    theirs = pytest.importorskip("torch_fidelity.metric_kid").kid_features_to_metric
    x, y = features(50, 20).abs(), features(60, 20, seed=1).abs()
    options = {"kid_subsets": subsets, "kid_subset_size": 15, "rng_seed": 2020, "verbose": False}
    expected = theirs(x, y, kid_degree=3, kid_gamma=None, kid_coef0=1, **options)
    mean, std = kid(x, y, subsets, 15, seed=2020)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-10)
