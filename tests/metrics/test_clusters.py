"""Intra-cluster diversity against loops over pairs, with distances of every form that users bring."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minegan_fast.metrics import intra_cluster_diversity
from minegan_fast.metrics.clusters import _draw_pairs


def pictures(n, seed=0, shape=(3, 4, 4)):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def rms(a, b):
    return (a - b).flatten(1).square().mean(1).sqrt()


def brute(images, targets):
    """Per cluster: number of members, mean distance of its pairs."""
    clusters = [[] for _ in targets]
    for image in images:
        clusters[int(np.argmin([float(rms(image[None], target[None])) for target in targets]))].append(image)
    means = []
    for members in clusters:
        values = [float(rms(a[None], b[None])) for a, b in itertools.combinations(members, 2)]
        means.append(np.mean(values) if values else np.nan)
    return [len(members) for members in clusters], means


class Perceptual(nn.Module):
    """Like lpips.LPIPS: [B, 1, 1, 1], and wrong in training mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.drop = nn.Dropout(0.9)
        self.seen = []

    def forward(self, a, b):
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        self.seen.append(len(a))
        a, b = self.drop(self.conv(a)), self.drop(self.conv(b))
        return (a - b).square().mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_matches_loops(batch):
    images, targets = pictures(40), pictures(4, seed=1)
    sizes, means = brute(images, targets)
    assert min(sizes) >= 2
    result = intra_cluster_diversity(images, targets, rms, batch=batch)
    assert result.sizes.tolist() == sizes
    assert result.diversity.tolist() == pytest.approx(means, rel=1e-6)
    assert (type(result.mean), type(result.std)) == (float, float)
    assert result[:2] == pytest.approx((np.mean(means), np.std(means)), rel=1e-6)


def test_ties_go_to_the_first_target_and_small_clusters_are_left_out():
    images = torch.tensor([[0.0], [1], [7], [10], [14]])
    targets = torch.tensor([[0.0], [3], [11]])
    with pytest.warns(UserWarning, match="1 of 3 targets are nearest to fewer than two of 5 images") as caught:
        mean, std, diversity, sizes = intra_cluster_diversity(images, targets, lambda a, b: (a - b).abs())
    assert caught[0].filename == __file__
    assert sizes.tolist() == [2, 1, 2]
    assert diversity[[0, 2]].tolist() == [1.0, 4.0]
    assert diversity[1].isnan()
    assert (mean, std) == (2.5, 1.5)


def test_a_module_is_evaluated_in_eval_mode_and_left_as_it_was():
    torch.manual_seed(0)
    module = Perceptual()
    module.drop.eval()
    module.conv.train()
    modes = [m.training for m in module.modules()]
    images, targets = pictures(30), pictures(3, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = intra_cluster_diversity(images, targets, module, batch=16)
    assert max(module.seen) == 16
    assert sum(module.seen) == 30 * 3 + sum(n * (n - 1) // 2 for n in result.sizes.tolist())
    assert [m.training for m in module.modules()] == modes
    assert result == intra_cluster_diversity(images, targets, module)._replace(
        diversity=result.diversity, sizes=result.sizes
    )

    def broken(module, inputs):
        raise RuntimeError("broken")

    module.conv.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        intra_cluster_diversity(images, targets, module)
    assert [m.training for m in module.modules()] == modes


def test_a_module_gets_its_own_dtype_and_a_function_what_was_given():
    module = Perceptual().double()
    images, targets = pictures(20), pictures(2, seed=1)
    expected = intra_cluster_diversity(images.double(), targets.double(), module)
    assert intra_cluster_diversity(images, targets.numpy(), module).mean == expected.mean
    seen = set()

    def distance(a, b):
        seen.update((a.dtype, b.dtype))
        return rms(a, b)

    intra_cluster_diversity(images.double(), targets.double(), distance)
    assert seen == {torch.float64}


def test_uint8_images_become_what_networks_take():
    generator = torch.Generator().manual_seed(0)
    images, targets = (torch.randint(256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8) for n in (20, 2))
    expected = intra_cluster_diversity(images / 127.5 - 1, targets / 127.5 - 1, rms)
    assert intra_cluster_diversity(images, targets.numpy(), rms).mean == pytest.approx(expected.mean, rel=1e-6)


def test_copies_of_the_targets_have_no_diversity():
    targets = pictures(3)
    result = intra_cluster_diversity(targets.repeat(5, 1, 1, 1), targets, rms)
    assert result.sizes.tolist() == [5, 5, 5]
    assert result[:2] == (0.0, 0.0)


def test_large_clusters_are_sampled_by_the_seed():
    images, targets = pictures(60), pictures(2, seed=1)
    calls = []

    def distance(a, b):
        calls.append(len(a))
        return rms(a, b)

    every = intra_cluster_diversity(images, targets, distance, pairs=None)
    calls.clear()
    first = intra_cluster_diversity(images, targets, distance, pairs=50)
    assert sum(calls) == 60 * 2 + 2 * 50
    assert intra_cluster_diversity(images, targets, distance, pairs=50).mean == first.mean
    others = [intra_cluster_diversity(images, targets, distance, pairs=50, seed=s).mean for s in range(1, 30)]
    assert len({first.mean, *others}) == 30
    assert np.mean(others) == pytest.approx(every.mean, abs=4 * np.std(others) / 29**0.5)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(2, 60), count=st.none() | st.integers(1, 2000), seed=st.integers(0, 99))
def test_pairs_are_distinct(n, count, seed):
    pairs = _draw_pairs(n, count, np.random.default_rng(seed)).tolist()
    total = n * (n - 1) // 2
    assert len({tuple(pair) for pair in pairs}) == len(pairs) == min(total, count or total)
    assert all(0 <= i < j < n for i, j in pairs)


def test_pairs_of_many():
    i, j = _draw_pairs(3_000_000, 5000, np.random.default_rng(0)).T
    assert (i >= 0).all()
    assert (i < j).all()
    assert int(j.max()) < 3_000_000
    assert float(i.double().mean()) == pytest.approx(1e6, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(6, 30), k=st.integers(1, 5), seed=st.integers(0, 999))
def test_properties(n, k, seed):
    images, targets = pictures(n, seed, (4,)).double(), pictures(k, seed + 1, (4,)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = intra_cluster_diversity(images, targets, rms)
        shuffled = intra_cluster_diversity(images.flip(0), targets.flip(0), rms)
        twice = intra_cluster_diversity(images, targets, lambda a, b: 2 * rms(a, b))
    assert int(result.sizes.sum()) == n
    assert shuffled.sizes.flip(0).tolist() == result.sizes.tolist()
    assert shuffled.mean == pytest.approx(result.mean, rel=1e-12)
    assert twice.mean == pytest.approx(2 * result.mean, rel=1e-12)
    sizes, means = brute(images, targets)
    assert result.sizes.tolist() == sizes
    np.testing.assert_allclose(result.diversity, means, rtol=1e-12)


P = pictures(5)


@pytest.mark.parametrize(
    ("images", "targets", "distance", "options", "error", "message"),
    [
        (P[:0], P, rms, {}, ValueError, r"images must be \[N, \.\.\.\] with at least one image, got \[0, 3, 4, 4\]"),
        (P, P[0, 0, 0], rms, {}, ValueError, r"targets must be \[N, \.\.\.\]"),
        (P, P[:, :1], rms, {}, ValueError, r"one shape, got \[3, 4, 4\] and \[1, 4, 4\]"),
        (P, P.to("meta").byte(), rms, {}, ValueError, "same device, got cpu and meta"),
        (P.long(), P, rms, {}, TypeError, r"images must be floating point in \[-1, 1\] or uint8, not torch.int64"),
        (P, P.index_fill(0, torch.tensor(3), torch.nan), rms, {}, ValueError, "1 of 5 targets hold NaN.* is number 3"),
        (P * 255, P, rms, {}, ValueError, r"images reach from -255 to 255, expected \[-1, 1\]"),
        (P, P, "lpips", {}, TypeError, "distance must be a module or function of two batches, not str"),
        (P, P, lambda a, b: rms(a, b).mean(), {}, ValueError, r"one number for each of 25 pairs, got \[\]"),
        (P, P, lambda a, b: 0.5, {}, ValueError, "one number for each of 25 pairs, got float"),
        (P, P, lambda a, b: 0 / rms(a, b), {}, ValueError, "NaN or inf for 5 pairs, the first is of 0 and 0"),
        (P, P, rms, {"batch": 0}, ValueError, "at least 1, got 0 and 1000"),
        (P, P, rms, {"pairs": 0}, ValueError, "at least 1, got 64 and 0"),
        (P, P, rms, {}, ValueError, "none of 5 clusters has two of the 5 images: generate more than 5"),
    ],
)
def test_wrong_arguments_are_named(images, targets, distance, options, error, message):
    with pytest.raises(error, match=message):
        intra_cluster_diversity(images, targets, distance, **options)


@pytest.mark.gpu
def test_on_a_gpu():
    module = Perceptual()
    images, targets = pictures(30), pictures(3, seed=1)
    expected = intra_cluster_diversity(images, targets, module).mean
    for x, y in ((images, targets), (images.cuda(), targets), (images.cuda(), targets.cuda())):
        assert intra_cluster_diversity(x, y, module.cuda()).mean == pytest.approx(expected, rel=1e-3)
    assert intra_cluster_diversity(images.cuda(), targets.cuda(), rms).mean == pytest.approx(
        intra_cluster_diversity(images, targets, rms).mean, rel=1e-5
    )
    with pytest.raises(ValueError, match="images and targets must be on the same device, got cuda:0 and cpu"):
        intra_cluster_diversity(images.cuda(), targets, rms)
