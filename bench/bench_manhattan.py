"""|p - q|_1 of all pairs of two samples, and the sums of signs that are its gradient, against `torch.cdist`.

Bound by arithmetic without products: two operations a pair and dimension.
"""

import pytest
import torch
from clock import Provider
from measure import OURS, Case

from minegan_fast.ops.manhattan import manhattan_distance, manhattan_signs

SIZES = {"cpu": [(256, 256, 64), (1000, 1000, 512)], "cuda": [(1024, 1024, 512), (4000, 4000, 2048)]}
LARGEST = {"test_manhattan": "-1"}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_manhattan(compare, device, pytestconfig, step, number):
    if pytestconfig.getoption("--quick") and number:
        pytest.skip("not of --quick")
    r, c, D = SIZES[device][number]
    generator = torch.Generator(device).manual_seed(0)
    p, q, A = (torch.randn(n, m, device=device, generator=generator) for n, m in ((r, D), (c, D), (r, c)))

    def ours(p, q, A):
        return manhattan_distance(p, q) if step == "forward" else manhattan_signs(A, p, q)

    def eager(p, q, A):
        if step == "forward":
            return lambda: (torch.cdist(p, q, p=1.0),)
        leaf = p.detach().requires_grad_()
        distance = torch.cdist(leaf, q, p=1.0)
        return lambda: torch.autograd.grad(distance, leaf, A)

    expected = eager(*(t.double() for t in (p, q, A)))()
    case = Case("manhattan", step, (r, c, D), torch.float32, 4 * (r * D + c * D + r * c), expected, flops=2 * r * c * D)
    case.rounding = 1e-5  # sums of D terms in another order
    backends = ("triton", "cpp", "reference")
    providers = [Provider(OURS, lambda: lambda: (ours(p, q, A),), backend) for backend in backends]
    compare(case, [*providers, Provider("eager", lambda: eager(p, q, A))])
