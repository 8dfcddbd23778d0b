"""Metrics of batches equal the functions of all features, however the batches are cut."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minegan_fast.metrics import (
    FID,
    KID,
    KMMD,
    FeatureStatistics,
    MeanVariance,
    PrecisionRecall,
    fid,
    kid,
    kmmd,
    mean_variance,
    precision_recall,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer than")

PAIRS = {
    "FID": (FID, fid),
    "KID": (lambda: KID(subsets=5, subset_size=20, seed=3), lambda x, y: kid(x, y, 5, 20, seed=3)),
    "KMMD": (lambda: KMMD(sigma=0.7), lambda x, y: kmmd(x, y, sigma=0.7)),
    "PrecisionRecall": (lambda: PrecisionRecall(k=2), lambda x, y: precision_recall(x, y, k=2)),
    "MeanVariance": (MeanVariance, lambda x, y: mean_variance(x)),
}
each = pytest.mark.parametrize(("make", "function"), PAIRS.values(), ids=PAIRS)


def features(n, d=6, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def feed(metric, x, y, sizes=(7, 1, 16)):
    for real, z in ((False, x), (True, y)):
        i = step = 0
        while i < len(z):
            size = sizes[step % len(sizes)]
            metric.update(z[i : i + size], real=real)
            i, step = i + size, step + 1
    return metric


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [(7, 1, 16), (1,), (100,), (3,)])
def test_equals_the_function_of_all_features(make, function, dtype, sizes):
    x, y = features(40, shift=0.4).to(dtype), features(33, seed=1).to(dtype)
    metric = feed(make(), x, y, sizes)
    assert metric.counts == (40, 33 if not isinstance(metric, MeanVariance) else 0)
    value = metric.compute()
    assert type(value) is type(function(x, y))
    assert value == pytest.approx(function(x, y), rel=1e-11)
    assert metric.compute() == value  # computing changes nothing
    metric.update(x, real=False)
    assert metric.compute() == pytest.approx(function(torch.cat([x, x]), y), rel=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    n=st.integers(2, 60),
    m=st.integers(2, 60),
    d=st.integers(1, 30),
    shift=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_fid_and_mean_variance_of_any_batches(sizes, n, m, d, shift):
    x, y = features(n, d, shift=shift), features(m, d, seed=1, shift=shift)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = (mean_variance(x) + mean_variance(y)) * d
        value = feed(FID(), x, y, sizes).compute()
        assert value == pytest.approx(fid(x, y), rel=1e-10, abs=1e-12 * max(1, shift) * size)
        assert feed(MeanVariance(), x, y, sizes).compute() == pytest.approx(mean_variance(x), rel=1e-10)


def test_fid_keeps_no_more_than_twice_the_dimensions():
    x, y = features(500, 5), features(1, 5)
    for sizes in ((1,), (3, 8), (500,)):
        metric = feed(FID(), x, y, sizes)
        assert metric.state_dict()["fake"]["rows"].shape[0] <= 10


def test_fid_of_singular_covariances_far_from_the_origin():
    # Sums of squares would lose all digits of the covariance here, and zero eigenvalues would become 1e-8 each.
    x, y = features(12, 40, shift=1e6), features(9, 40, seed=1, shift=1e6)
    with pytest.warns(UserWarning, match="fake has 12 samples and real has 9 samples for 40 dimensions") as caught:
        value = feed(FID(), x, y, (5,)).compute()
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="x has 12 samples"):
        assert value == pytest.approx(fid(x, y), rel=1e-8)


def test_fid_gives_statistics():
    x, y = features(40), features(30, seed=1)
    metric = feed(FID(), x, y)
    for real, z in ((False, x), (True, y)):
        statistics, expected = metric.statistics(real), FeatureStatistics.of(z)
        assert statistics.count == len(z)
        torch.testing.assert_close(statistics.mean, expected.mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(statistics.covariance, expected.covariance, rtol=1e-11, atol=1e-13)
    with pytest.raises(ValueError, match="seen 0 real samples, statistics need at least 2"):
        FID().statistics(real=True)


@each
def test_reset(make, function):
    x, y = features(40, shift=0.4), features(33, seed=1)
    metric = feed(make(), x, y)
    metric.reset()
    assert metric.counts == (0, 0)
    feed(metric, features(30, 4).float(), features(30, 4, seed=1).float())  # another D and dtype
    metric.reset()
    value = feed(metric, x, y).compute()
    assert value == pytest.approx(function(x, y), rel=1e-11)
    metric.reset(keep_real=True)
    assert metric.counts[0] == 0
    metric.update(x + 1, real=False)
    assert metric.compute() == pytest.approx(function(x + 1, y), rel=1e-11)


@each
def test_state_is_saved_loaded_and_moved(make, function, tmp_path):
    x, y = features(40, shift=0.4), features(33, seed=1)
    metric = feed(make(), x[:25], y[:21])
    torch.save(metric.state_dict(), tmp_path / "state.pt")
    loaded = make()
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert loaded.to("cpu") is loaded
    feed(loaded, x[25:], y[21:])
    assert loaded.compute() == pytest.approx(function(x, y), rel=1e-11)
    assert metric.counts[0] == 25
    with pytest.raises(ValueError, match="every batch must have the dimensions of the first, 6, got 5"):
        loaded.update(features(3, 5), real=False)
    loaded.load_state_dict(make().state_dict())
    assert loaded.counts == (0, 0)
    loaded.update(features(3, 5), real=False)
    loaded.to("meta")
    with pytest.raises(ValueError, match="every batch must have the device of the first, meta, got cpu"):
        loaded.update(features(3, 5), real=False)


@each
def test_merge(make, function):
    x, y = features(40, shift=0.4), features(33, seed=1)
    first, second = feed(make(), x[:20], y[:2]), feed(make(), x[20:], y[2:])
    alone = second.compute()
    whole = make()
    whole.merge(first)
    whole.merge(second)
    whole.merge(make())
    assert whole.compute() == pytest.approx(function(x, y), rel=1e-11)
    assert second.compute() == alone
    with pytest.raises(ValueError, match="dimensions of the first, 6, got 4"):
        whole.merge(feed(make(), features(3, 4), features(3, 4)))
    with pytest.raises(TypeError, match="cannot merge int"):
        whole.merge(3)


@each
def test_a_batch_may_be_overwritten_and_has_no_gradient(make, function):
    x, y = features(40, shift=0.4), features(33, seed=1)
    metric, buffer = make(), torch.empty(10, 6, dtype=torch.float64)
    for part in x.split(10):
        metric.update(buffer.copy_(part), real=False)
    metric.update(y.requires_grad_(), real=True)
    buffer.zero_()
    assert metric.compute() == pytest.approx(function(x, y), rel=1e-11)


def test_half_precision_is_kept_as_float32_and_arrays_are_taken():
    x, y = features(40).bfloat16(), features(33, seed=1).bfloat16()
    metric = feed(KMMD(), x, y)
    metric.update(x[:3].float().numpy(), real=False)
    assert metric.compute() == kmmd(torch.cat([x, x[:3]]), y)
    assert metric.state_dict()["fake"]["rows"].dtype == torch.float32


@each
def test_too_few_samples_are_named(make, function):
    metric = make()
    with pytest.raises(ValueError, match=r"^\w+ has seen 0 fake.* samples, it needs at least [23]"):
        metric.compute()
    feed(metric, features(1), features(1))
    with pytest.raises(ValueError, match="has seen 1 fake"):
        metric.compute()
    if not isinstance(metric, MeanVariance):
        metric.update(features(30), real=False)
        with pytest.raises(ValueError, match=r"seen 31 fake and 1 real samples, it needs at least [23] of each"):
            metric.compute()


X = features(4)


@each
@pytest.mark.parametrize(
    ("batch", "real", "error", "message"),
    [
        (X[:, :5], False, ValueError, "every batch must have the dimensions of the first, 6, got 5"),
        (X[:, :5], True, ValueError, "every batch must have the dimensions of the first, 6, got 5"),
        (X.float(), False, ValueError, "dtype of the first, torch.float64, got torch.float32"),
        (X.index_fill(0, torch.tensor(2), torch.inf), False, ValueError, "features holds NaN or inf in 1 of 4 rows"),
        (X[:0], False, ValueError, r"features must be \[samples, dimensions\]"),
        (X.byte().numpy(), True, TypeError, "images go through a feature extractor first"),
        (X, X, TypeError, "real must be True or False, not Tensor"),
        (X, 1, TypeError, "real must be True or False, not int"),
    ],
)
def test_wrong_batches_are_named_and_change_nothing(make, function, batch, real, error, message):
    metric = feed(make(), features(20), features(20, seed=1))
    counts, value = metric.counts, metric.compute()
    with pytest.raises(error, match=message):
        metric.update(batch, real=real)
    assert metric.counts == counts
    assert metric.compute() == value


def test_wrong_states_are_named():
    metric = feed(FID(), features(5), features(5))
    with pytest.raises(ValueError, match="expected a state of KMMD, got one of FID"):
        KMMD().load_state_dict(metric.state_dict())
    state = metric.state_dict()
    del state["real"]["mean"]
    with pytest.raises(ValueError, match=r"state of FID is not whole: .*mean"):
        FID().load_state_dict(state)
    with pytest.raises(ValueError, match="state of FID is not whole: 'like'"):
        FID().load_state_dict({k: v for k, v in metric.state_dict().items() if k != "like"})


def test_repr_says_what_was_seen():
    assert repr(feed(FID(), features(5), features(6))) == "FID(5 fake, 6 real samples)"


def test_fid_matches_torchmetrics_batch_by_batch():
    module = torch.nn.Identity()
    module.num_features = 6
    other = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(module)
    x, y = features(60, shift=0.5), features(70, seed=1)
    for part in range(0, 60, 10):
        other.update(x[part : part + 10], real=False)
    other.update(y, real=True)
    assert feed(FID(), x, y).compute() == pytest.approx(other.compute().item(), rel=1e-7)
    assert np.isfinite(other.compute().item())


@pytest.mark.gpu
@each
def test_on_a_gpu(make, function):
    x, y = features(40, shift=0.4), features(33, seed=1)
    metric = feed(make(), x.cuda(), y.cuda())
    assert metric.compute() == pytest.approx(function(x, y), rel=1e-6)
    with pytest.raises(ValueError, match="device of the first, cuda:0, got cpu"):
        metric.update(x, real=False)
    metric.to("cpu").update(x, real=False)
    assert metric.compute() == pytest.approx(function(torch.cat([x, x]), y), rel=1e-6)
