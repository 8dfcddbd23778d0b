"""FID against the textbook formula with scipy's matrix root, and where that formula breaks down."""

import numpy as np
import pytest
import torch

from minegan_fast.metrics import fid


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
