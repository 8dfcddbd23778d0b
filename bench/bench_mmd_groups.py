"""The loss of kernel mining: distances of groups of features from a fixed target, and their gradient.

Competitors of mmd_groups: a loop over `mmd2`; the plain formulation by products, which keeps what is the target's alone
as ours does, and torch.compile of that; and as a floor the products alone, x with [x; y] and, for the gradient, weights
of all pairs with [x; y].
"""

import pytest
import torch
from bench_mmd import averaged
from clock import Provider
from measure import OURS, Case

from minegan_fast.ops import MmdTarget, mmd2, mmd_groups, use_backend

LITE = (144, 240, 672, 640)  # of EfficientNet-Lite0
INCEPTION = (192, 288, 768, 1280, 2048, 4000)  # as large as features of Inception get
CASES = [  # N, M, sizes of the groups, bandwidths in typical distances
    (32, 200, LITE, (0.5, 1.0, 2.0)),
    (16, 20, LITE, (0.5, 1.0, 2.0)),
    (64, 200, LITE, (0.5, 1.0, 2.0)),
    (256, 200, LITE, (0.5, 1.0, 2.0)),
    (32, 2000, INCEPTION, (0.25, 0.5, 1.0, 2.0, 4.0)),
    (256, 2000, INCEPTION, (0.25, 0.5, 1.0, 2.0, 4.0)),
]
LARGEST = {"test_mmd_groups": "256x2000x"}


def samples(n, sizes, device, seed, scale=1.0, shift=0.0):
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(n, D, device=device, generator=generator) * scale + shift for D in sizes]


def loop(xs, ys, bandwidths, device):
    pairs = [*zip(ys, bandwidths, strict=True)]
    return lambda xs: torch.stack(
        [mmd2(x, y, bandwidth=b, validate=device == "cpu") for x, (y, b) in zip(xs, pairs, strict=True)]
    )


def fused(xs, ys, bandwidths, device):
    target = MmdTarget(ys, bandwidths)
    return lambda xs: mmd_groups(xs, target, validate=device == "cpu")


def plain(xs, ys, bandwidths, device):
    M = len(ys[0])
    norms = [y.square().sum(1) for y in ys]
    squares = [n[:, None] + n - 2 * y @ y.T for n, y in zip(norms, ys, strict=True)]
    own = [(averaged(t, b).sum() - M) / (M * (M - 1)) for t, b in zip(squares, bandwidths, strict=True)]

    def distances(xs):
        N, found = len(xs[0]), []
        for x, y, n, b, constant in zip(xs, ys, norms, bandwidths, own, strict=True):
            r = x.square().sum(1)
            within = averaged(r[:, None] + r - 2 * x @ x.T, b)
            across = averaged(r[:, None] + n - 2 * x @ y.T, b)
            found.append((within.sum() - within.diagonal().sum()) / (N * (N - 1)) + constant - 2 * across.mean())
        return torch.stack(found)

    return distances


def compiled(xs, ys, bandwidths, device):
    return torch.compile(plain(xs, ys, bandwidths, device), dynamic=False)


def products(xs, ys, training):
    N, M = len(xs[0]), len(ys[0])
    ys = [y.clone() for y in ys]  # ours are a copy too: none shall find in the cache what its competitor has read
    weights = [(torch.randn(N, N, device=x.device), torch.randn(N, M, device=x.device)) for x in xs]

    def call():
        found = [product for x, y in zip(xs, ys, strict=True) for product in (x @ x.T, x @ y.T)]
        if training:
            found += [torch.addmm(a @ x, b, y) for x, y, (a, b) in zip(xs, ys, weights, strict=True)]
        return found

    return lambda: call


@pytest.mark.parametrize("step", ["forward", "forward + backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}x{case[1]}x{sum(case[2])}")
def test_mmd_groups(compare, device, pytestconfig, case, step):
    if pytestconfig.getoption("--quick") and case is not CASES[0]:
        pytest.skip("not of --quick")
    N, M, sizes, ladder = case
    xs, ys = samples(N, sizes, device, 0), samples(M, sizes, device, 1, 1.1, 0.1)
    bandwidths = [[s * (2 * D) ** 0.5 for s in ladder] for D in sizes]
    training = step == "forward + backward"

    def make(way, xs=xs, ys=ys):
        function = way(xs, ys, bandwidths, device)

        def call():
            if not training:
                return (function(xs),)
            leaves = [x.detach().requires_grad_() for x in xs]
            values = function(leaves)
            return values.detach(), *torch.autograd.grad(values.sum(), leaves)

        return lambda: call

    with use_backend("reference"):
        expected = make(loop, [x.double() for x in xs], [y.double() for y in ys])()()
    torch.compiler.reset()
    providers = [Provider(OURS, make(fused)), Provider("mmd2 in a loop", make(loop)), Provider("plain", make(plain))]
    providers.append(Provider("torch.compile", make(compiled)))
    providers.append(Provider("products", products(xs, ys, training), floor=True))
    width = sum(sizes)
    case = Case(
        "mmd_groups", step, (N, M, width), torch.float32, bytes=4 * width * ((1 + training) * N + M), expected=expected,
        flops=(1 + training) * 2 * N * (N + M) * width, yardstick="plain", rounding=1e-4,
        extra={"groups": len(sizes), "bandwidths": len(ladder)},
    )  # fmt: skip
    compare(case, providers)
