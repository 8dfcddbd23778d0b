"""FID against the textbook formula with scipy's matrix root, and where that formula breaks down."""

import io
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minegan_fast.metrics import FeatureStatistics, fid


def features(n, d, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix * scale + shift


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 6), (50, 80, 1), (33, 40, 32)])
def test_matches_the_formula_with_a_matrix_root(n, m, d):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = features(n, d).numpy(), features(m, d, seed=1, shift=0.5).numpy()
    covariances = [np.atleast_2d(np.cov(z, rowvar=False)) for z in (x, y)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    value = fid(x, y)
    assert type(value) is float
    assert value == pytest.approx(expected, rel=1e-7)


def test_diagonal_gaussians_have_a_closed_form():
    # Columns orthogonal and centred by construction: the covariances are diagonal exactly.
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    a, b = torch.tensor([1.0, 2, 3], dtype=torch.float64), torch.tensor([2.0, 2, 0.5], dtype=torch.float64)
    expected = 9 * 3 + (4 / 3) * (a - b).square().sum().item()
    assert fid(signs * a, signs * b + 3) == pytest.approx(expected, rel=1e-12)


def test_is_zero_for_the_same_sample_even_where_the_covariance_is_singular():
    assert fid(features(100, 5), features(100, 5)) == pytest.approx(0, abs=1e-9)
    few = features(10, 64)
    with pytest.warns(UserWarning, match="x has 10 samples and y has 10 samples for 64 dimensions"):
        # Roots of the 55 zero eigenvalues would leave sqrt(machine epsilon) each, times the scale: 1e-6.
        assert fid(few, few) == pytest.approx(0, abs=1e-9 * few.square().sum().item())


def test_singular_covariances_equal_the_full_formula_in_their_subspace():
    x, y = features(20, 5), features(15, 5, seed=1)
    rotation = torch.linalg.qr(torch.randn(40, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    with pytest.warns(UserWarning, match="rank-deficient"):
        assert fid(x @ rotation.T, y @ rotation.T) == pytest.approx(fid(x, y), rel=1e-10)


def test_warns_only_for_the_sample_that_is_too_small():
    with pytest.warns(UserWarning, match=r"^y has 6 samples for 6 dimensions: .*use kid or kmmd"):
        fid(features(50, 6), features(6, 6, seed=1))
    fid(features(50, 6), features(7, 6, seed=1))


def test_symmetry_translation_scale_and_rotation():
    x, y = features(60, 4), features(70, 4, seed=1)
    value = fid(x, y)
    assert fid(y, x) == pytest.approx(value, rel=1e-10)
    assert fid(x + 100, y + 100) == pytest.approx(value, rel=1e-8)
    assert fid(3 * x, 3 * y) == pytest.approx(9 * value, rel=1e-10)
    assert fid(x.flip(1), y.flip(1)) == pytest.approx(value, rel=1e-10)
    assert fid(x + 2, x) == pytest.approx(16, rel=1e-9)


def test_float32_features_are_computed_in_float64():
    x, y = features(60, 4).float(), features(60, 4, seed=1).float()
    assert fid(x, y) == fid(x.double(), y.double())


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(1, 3), torch.ones(4, 3), "x has 1 sample"),
        (torch.ones(4, 3), torch.ones(4, 2), "same number of dimensions"),
        (torch.ones(4, 3), torch.full((4, 3), float("inf")), "y holds NaN or inf"),
    ],
)
def test_wrong_features_are_named(x, y, message):
    with pytest.raises(ValueError, match=message):
        fid(x, y)


class Passthrough(torch.nn.Module):
    """What torchmetrics takes for an Inception: images are the features already."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_matches_torchmetrics(shift):
    fid_of = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(Passthrough(7))
    x, y = features(90, 7), features(60, 7, seed=1, shift=shift)
    fid_of.update(x, real=False)
    fid_of.update(y, real=True)
    assert fid(x, y) == pytest.approx(fid_of.compute().item(), rel=1e-7)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 6), (50, 80, 1), (33, 40, 32)])
def test_statistics_stand_for_features(n, m, d):
    x, y = features(n, d), features(m, d, seed=1, shift=0.5)
    value = fid(x, y)
    a, b = FeatureStatistics.of(x), FeatureStatistics.of(y.numpy())
    assert (a.count, b.count) == (n, m)
    np.testing.assert_allclose(a.covariance, np.atleast_2d(np.cov(x.numpy(), rowvar=False)), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(a.mean, x.numpy().mean(0), rtol=1e-12)
    assert fid(a, b) == pytest.approx(value, rel=1e-9)
    assert fid(a, y) == pytest.approx(value, rel=1e-9)
    assert fid(x, b) == pytest.approx(value, rel=1e-9)


def test_statistics_of_few_samples_are_exact_and_warn():
    few, many = features(10, 64), features(100, 64, seed=1)
    with pytest.warns(UserWarning, match="x has 10 samples for 64 dimensions"):
        expected = fid(few, many)
    statistics = FeatureStatistics.of(few)
    with pytest.warns(UserWarning, match="x has 10 samples for 64 dimensions"):
        assert fid(statistics, many) == pytest.approx(expected, rel=1e-9)
    with pytest.warns(UserWarning, match="x has 10 samples and y has 10 samples"):
        assert fid(statistics, few) == pytest.approx(0, abs=1e-9 * few.square().sum().item())
    # No count, no warning; the zero eigenvalues are known by their size.
    unknown = FeatureStatistics(statistics.mean, statistics.covariance)
    assert fid(unknown, many) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 40), m=st.integers(2, 40), d=st.integers(1, 12), seed=st.integers(0, 10**6), scale=st.floats(-3, 3)
)
def test_properties(n, m, d, seed, scale):
    x, y = features(n, d, seed, scale=10**scale), features(m, d, seed + 1, shift=0.5)
    rotation = torch.linalg.qr(features(d, d, seed + 2)).Q
    size = (x.square().sum() + y.square().sum()).item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = fid(x, y)
        assert value >= (x.mean(0) - y.mean(0)).square().sum().item() - 1e-9 * size
        assert fid(y, x) == pytest.approx(value, rel=1e-9, abs=1e-12 * size)
        assert fid(x @ rotation, y @ rotation) == pytest.approx(value, rel=1e-8, abs=1e-11 * size)
        assert fid(x, x.flip(0)) == pytest.approx(0, abs=1e-11 * size)
        statistics = FeatureStatistics.of(x), FeatureStatistics.of(y)
        assert fid(*statistics) == pytest.approx(value, rel=1e-6, abs=1e-6 * size)


def test_statistics_files(tmp_path):
    x, y = features(60, 5), features(70, 5, seed=1, shift=1)
    statistics = FeatureStatistics.of(y)
    statistics.save(tmp_path / "y.npz")
    loaded = FeatureStatistics.load(tmp_path / "y.npz")
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.covariance, statistics.covariance)
    assert loaded.count == 70
    # As pytorch-fid writes it.
    np.savez_compressed(tmp_path / "other.npz", mu=y.numpy().mean(0), sigma=np.cov(y.numpy(), rowvar=False))
    other = FeatureStatistics.load(str(tmp_path / "other.npz"))
    assert other.count is None
    assert fid(x, other) == pytest.approx(fid(x, y), rel=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.npz", "y.npz"]


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*missing\.npz"):
        FeatureStatistics.load(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("mu sigma")
    with pytest.raises(ValueError, match=r"text\.npz is not an \.npz file"):
        FeatureStatistics.load(tmp_path / "text.npz")
    np.savez(tmp_path / "keys.npz", mu=np.zeros(3), cov=np.eye(3))
    with pytest.raises(ValueError, match=r"keys\.npz: it has no sigma; it holds mu, cov"):
        FeatureStatistics.load(tmp_path / "keys.npz")
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match=r"pickle\.npz: .*allow_pickle=False"):
        FeatureStatistics.load(tmp_path / "pickle.npz")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"shape\.npz: expected a mean \[D\] and a covariance \[D, D\], got \[3\]"):
        FeatureStatistics.load(tmp_path / "shape.npz")


@pytest.mark.parametrize(
    ("mean", "covariance", "count", "error", "message"),
    [
        (np.zeros(2, int), np.eye(2), None, TypeError, "mean must be floating point, not torch.int64"),
        (np.zeros(2), np.full((2, 2), np.nan), None, ValueError, "covariance holds NaN or inf"),
        (np.zeros((1, 2)), np.eye(2), None, ValueError, r"expected a mean \[D\]"),
        (np.zeros(0), np.eye(0), None, ValueError, r"expected a mean \[D\]"),
        (np.zeros(2), np.eye(2), 1, ValueError, "at least 2 samples, got count 1"),
        (np.zeros(2), np.array([[1.0, 0.5], [0, 1]]), None, ValueError, "not symmetric"),
        (torch.zeros(2, device="meta"), np.eye(2), None, ValueError, "same device"),
    ],
)
def test_wrong_statistics_are_named(mean, covariance, count, error, message):
    with pytest.raises(error, match=message):
        FeatureStatistics(mean, covariance, count)


def test_statistics_of_another_network_or_no_covariance_are_named():
    with pytest.raises(ValueError, match="same number of dimensions, got 4 and 3"):
        fid(features(9, 4), FeatureStatistics(np.zeros(3), np.eye(3)))
    with pytest.raises(ValueError, match="eigenvalues from -1 to 2"):
        fid(features(9, 2), FeatureStatistics(np.zeros(2), np.diag([-1.0, 2.0])))


def test_a_warning_points_at_the_caller():
    with pytest.warns(UserWarning, match="rank-deficient") as caught:
        fid(features(3, 4), features(9, 4))
    assert caught[0].filename == __file__


@pytest.mark.gpu
def test_on_a_gpu():
    x, y = features(60, 5), features(50, 5, seed=1, shift=1)
    assert fid(x.cuda(), y.cuda()) == pytest.approx(fid(x, y), rel=1e-9)
    statistics = FeatureStatistics.of(y)
    assert fid(x.cuda(), statistics.to("cuda")) == pytest.approx(fid(x, y), rel=1e-9)
    with pytest.raises(ValueError, match="x and y must be on the same device, got cuda:0 and cpu"):
        fid(x.cuda(), statistics)


@pytest.mark.parametrize("shape", [(10**6, 10**6), (2**40,)])
def test_a_header_that_announces_more_than_the_file_holds(tmp_path, shape):
    path = tmp_path / "statistics.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(64))
    with pytest.raises(ValueError, match="mu is said to have the shape"):
        FeatureStatistics.load(path)


def test_damaged_archives_are_named(tmp_path):
    path = tmp_path / "statistics.npz"
    FeatureStatistics.of(torch.randn(9, 3)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"PK\x03\x04", b"PK\x03\x05", 1))
    with pytest.raises(ValueError, match=r"statistics\.npz: "):
        FeatureStatistics.load(path)
