"""winner at batches of multi-GAN mining: few numbers, so that a call is all that costs."""

import pytest
import torch
from clock import Provider
from measure import OURS, Case

from minegan_fast.ops import winner

CASES = [(2, 16), (8, 32), (64, 256)]  # branches, samples
LARGEST = {"test_winner": "64x256"}


def eager(scores):
    """What a script writes: the winners and their groups, without NaN."""
    who = scores.argmax(0)
    return who, torch.bincount(who, minlength=len(scores)), scores.isnan().sum(1), who.argsort(stable=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def test_winner(compare, device, pytestconfig, case):
    if pytestconfig.getoption("--quick") and case != CASES[0]:
        pytest.skip("--quick")
    N, B = case
    scores = torch.randn(N, B, device=device, generator=torch.Generator(device).manual_seed(0))
    expected = [t.double() for t in eager(scores)]
    row = Case("winner", "inference", case, torch.float32, bytes=4 * N * B + 16 * (N + B), expected=expected)
    providers = [Provider(OURS, lambda: lambda: winner(scores), backend) for backend in ("triton", "reference")]
    compare(row, [*providers, Provider("eager", lambda: lambda: eager(scores))])
