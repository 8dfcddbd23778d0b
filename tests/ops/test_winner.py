import math

import pytest
import torch

from minegan_fast.ops import use_backend, winner
from minegan_fast.ops.winner import winner_of_scores

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (1, 7), (2, 16), (3, 5), (8, 130), (17, 33), (64, 300), (70, 1)]


def by_hand(scores):
    """The definition, sample by sample."""
    N, B = len(scores), len(scores[0])
    who = []
    for b in range(B):
        column = [(s[b], -i) for i, s in enumerate(scores) if not math.isnan(s[b])]
        who.append(-max(column)[1] if column else -1)
    groups = [[b for b in range(B) if who[b] == i] for i in (*range(N), -1)]
    nans = [sum(map(math.isnan, row)) for row in scores]
    return who, [len(group) for group in groups[:N]], nans, [b for group in groups for b in group]


def assert_right(scores):
    found = winner(scores)
    assert [t.tolist() for t in found] == [*by_hand(scores.tolist())]
    assert all(t.dtype == torch.int64 and t.device == scores.device for t in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(backend, device, shape, dtype):
    scores = torch.randn(shape).to(device, dtype)
    assert_right(scores)
    scores[torch.rand(shape) < 0.4] = torch.nan
    scores[torch.rand(shape) < 0.1] = -torch.inf
    assert_right(scores)
    assert_right(scores.to(torch.float64).sign().to(dtype))  # many ties


def test_ties_go_to_the_first_and_samples_keep_their_order(backend, device):
    scores = torch.tensor([[0.0, 1, 2, 0, 1, 2], [0, 1, 1, 1, 1, 3], [0, 0, 2, 1, 0, 3]], device=device)
    who, counts, nans, order = winner(scores)
    assert who.tolist() == [0, 0, 0, 1, 0, 1]
    assert counts.tolist() == [4, 2, 0]
    assert nans.tolist() == [0, 0, 0]
    assert order.tolist() == [0, 1, 2, 4, 3, 5]


def test_nan_never_wins(backend, device):
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[nan, nan, 5, nan], [-inf, 0, nan, nan], [nan, 9, nan, nan]], device=device)
    who, counts, nans, order = winner(scores)
    assert who.tolist() == [1, 2, 0, -1]
    assert counts.tolist() == [1, 1, 1]
    assert nans.tolist() == [3, 2, 3]
    assert order.tolist() == [2, 0, 1, 3], "the sample that none wins comes last"
    assert winner(torch.tensor([[inf], [nan]], device=device)).who.tolist() == [0]


@pytest.mark.parametrize("lay", [lambda x: x.T.contiguous().T, lambda x: x[:, ::2], lambda x: x[:1].expand(5, -1)])
def test_scores_may_lie_in_memory_as_they_will(backend, device, lay):
    assert_right(lay(torch.randn(5, 12, device=device)))


def test_no_sample(backend, device):
    who, counts, nans, order = winner(torch.empty(3, 0, device=device))
    assert (who.shape, order.shape) == ((0,), (0,))
    assert counts.tolist() == nans.tolist() == [0, 0, 0]


def test_a_gradient_does_not_pass(backend, device):
    assert not any(t.requires_grad for t in winner(torch.randn(2, 3, device=device, requires_grad=True)))


def test_opcheck(backend, device):
    for shape in ((1, 1), (3, 8)):
        torch.library.opcheck(winner_of_scores.library, (torch.randn(shape, device=device),))


def test_compiles_in_one_graph(backend, device):
    def both(scores):
        who, counts, nans, order = winner(scores * 2)
        return who + 1, counts, nans, order

    scores = torch.randn(4, 9, device=device)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(scores), both(scores)))


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (None, TypeError, "scores must be a float32.*got NoneType"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "scores must be a float32.*got torch.int64"),
        (torch.zeros(3), ValueError, r"scores must be \[branches, samples\] of at least one branch, got \[3\]"),
        (torch.zeros(0, 3), ValueError, r"at least one branch, got \[0, 3\]"),
    ],
)
def test_wrong_arguments_are_named(scores, error, message):
    with pytest.raises(error, match=message):
        winner(scores)


def test_a_backend_that_is_missing_is_named():
    with use_backend("cpp"), pytest.raises(RuntimeError, match="winner_of_scores has no cpp implementation"):
        winner(torch.zeros(2, 3))
