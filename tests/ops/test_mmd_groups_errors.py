"""What mmd_groups and its target refuse, with the group that is wrong."""

import pytest
import torch

from minegan_fast.ops import MmdTarget, mmd_groups

NAN, INF = float("nan"), float("inf")


def ones(n, *sizes, dtype=torch.float32):
    return [torch.rand(n, D, generator=torch.Generator().manual_seed(D), dtype=dtype) for D in sizes]


def with_(x, value, row):
    x = x.clone()
    x[row, 1] = value
    return x


@pytest.mark.parametrize(
    ("groups", "bandwidths", "error", "message"),
    [
        ([], 1.0, ValueError, "groups is empty"),
        (torch.ones(3, 4), 1.0, TypeError, "groups must be a sequence of one tensor .*not a tensor"),
        ([torch.ones(3, 4), [1.0]], 1.0, TypeError, "group 1 of groups must be a tensor"),
        ([*ones(3, 4), torch.ones(3, 4, dtype=torch.uint8)], 1.0, TypeError, "group 1 of groups holds torch.uint8"),
        ([torch.ones(3, 4, 1)], 1.0, ValueError, r"group 0 of groups must be \[samples, dimensions\]"),
        ([*ones(3, 4), *ones(5, 4)], 1.0, ValueError, "group 0 has 3, group 1 5"),
        ([*ones(3, 4), torch.ones(3, 2, device="meta")], 1.0, ValueError, "group 1 of groups is on meta"),
        (ones(3, 4, 5), [1.0], ValueError, "2 groups and bandwidths for 1"),
        (ones(3, 4, 5), [1.0, -2.0], ValueError, "bandwidth of group 1 must be a finite number > 0.*got -2.0"),
        (ones(3, 4, 5), [[], 1.0], ValueError, "bandwidth of group 0 must be"),
        (ones(3, 4), None, TypeError, "bandwidths must be a number or one bandwidth, or several, for every group"),
        (ones(3, 4), torch.ones(1, requires_grad=True), ValueError, "bandwidth of group 0 gets no gradient"),
        ([*ones(3, 4), with_(ones(3, 5)[0], NAN, 2)], 1.0, ValueError, "group 1 of groups holds NaN.*first is row 2"),
        (ones(1, 4), 1.0, ValueError, "at least 2 target samples, got 1: unbiased=False takes 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_target(groups, bandwidths, error, message):
    with pytest.raises(error, match=message):
        MmdTarget(groups, bandwidths)


@pytest.mark.parametrize(
    ("xs", "error", "message"),
    [
        (torch.ones(3, 4), TypeError, "xs must be a sequence"),
        ([], ValueError, "xs is empty"),
        (ones(3, 4), ValueError, "target has 2 groups of features, xs has 1"),
        (ones(3, 4, 6), ValueError, "group 1 of xs has 6 dimensions, the target's 5"),
        ([*ones(3, 4), *ones(2, 5)], ValueError, "group 0 has 3, group 1 2"),
        ([x.to("meta") for x in ones(3, 4, 5)], ValueError, "must be on the target's device, cpu, got meta"),
        ([*ones(3, 4), torch.ones(3, 5, dtype=torch.int64)], TypeError, "group 1 of xs holds torch.int64"),
        ([*ones(3, 4), *ones(3, 5, dtype=torch.float64)], TypeError, "group 1 of xs is float64, the target float32"),
        (ones(1, 4, 5), ValueError, "batch of 1: use a larger batch, or a target with unbiased=False"),
        ([*ones(3, 4), with_(ones(3, 5)[0], NAN, 1)], ValueError, "group 1 of xs holds NaN or inf in 1 of 3.*is row 1"),
        ([with_(ones(3, 4)[0], INF, 2), *ones(3, 5)], ValueError, "group 0 of xs holds NaN or inf.*first is row 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_features(xs, error, message):
    with pytest.raises(error, match=message):
        mmd_groups(xs, MmdTarget(ones(6, 4, 5), 1.0))


def test_a_target_that_is_none():
    with pytest.raises(TypeError, match="target must be an MmdTarget, not list"):
        mmd_groups(ones(3, 4), ones(3, 4))


def test_float32_features_meet_a_target_of_float64():
    target = MmdTarget([*ones(6, 4), *ones(6, 5, dtype=torch.float64)], 1.0)
    xs = ones(3, 4, 5)
    found = mmd_groups(xs, target)
    assert target.dtype == found.dtype == torch.float64
    assert torch.equal(found, mmd_groups([x.double() for x in xs], target))


def test_a_target_says_what_it_is():
    target = MmdTarget(ones(6, 4, 5), [1.0, 2.0], unbiased=False)
    assert (target.sizes, target.count, target.dtype) == ([4, 5], 6, torch.float32)
    assert repr(target) == "MmdTarget(6 samples, groups of [4, 5], biased, torch.float32, cpu)"


def test_a_target_keeps_none_of_the_callers_memory():
    ys, xs = ones(6, 4), ones(3, 4)
    target = MmdTarget(ys, 1.0)
    before = mmd_groups(xs, target)
    ys[0].zero_()
    assert torch.equal(mmd_groups(xs, target), before)
