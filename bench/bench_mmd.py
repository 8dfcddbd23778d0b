"""mmd2 with five gaussian bandwidths, its gradient, its memory; and KID over 100 subsets of 1,000.

Competitors of mmd2: the pooled `cdist` formulation, the one by products ("norms"), torch.compile of that, KeOps where
it is installed, and as a floor the three products of the samples alone. Of KID: the loop over subsets in NumPy that
torch-fidelity runs, and torchmetrics.
"""

import functools
import importlib.util
import time
import warnings

import numpy as np
import pytest
import torch
from clock import Provider, peak_bytes
from measure import OURS, Case, whole_steps
from torch import nn

from minegan_fast.metrics import kid
from minegan_fast.metrics.kernel import _draw
from minegan_fast.ops import mmd2, use_backend

SIZES = {  # of each sample, and D
    "cpu": [(256, 512), (2000, 64), (2000, 2048)],
    "cuda": [(1024, 512), (4000, 2048), (10000, 2048)],
}
LARGEST = {"test_mmd2": "10000x2048"}
LADDER = (0.25, 0.5, 1.0, 2.0, 4.0)


def unbiased(k, N, M):
    within = [(b.sum() - b.diagonal().sum()) / (n * (n - 1)) for b, n in ((k[:N, :N], N), (k[N:, N:], M))]
    return sum(within) - 2 * k[:N, N:].mean()


def averaged(d2, bandwidths):
    return sum(torch.exp(d2 * (-0.5 / s**2)) for s in bandwidths) / len(bandwidths)


def by_cdist(x, y, bandwidths):
    z = torch.cat([x, y])
    return unbiased(averaged(torch.cdist(z, z).square(), bandwidths), len(x), len(y))


def by_norms(x, y, bandwidths):
    z = torch.cat([x, y])
    norms = z.square().sum(1)
    return unbiased(averaged(norms[:, None] + norms - 2 * z @ z.T, bandwidths), len(x), len(y))


def by_keops(x, y, bandwidths):
    from pykeops.torch import LazyTensor

    def total(a, b):
        d2 = ((LazyTensor(a[:, None]) - LazyTensor(b[None])) ** 2).sum(-1)
        return sum((d2 * (-0.5 / s**2)).exp() for s in bandwidths).sum(1).sum() / len(bandwidths)

    N, M = len(x), len(y)
    return (total(x, x) - N) / (N * (N - 1)) + (total(y, y) - M) / (M * (M - 1)) - 2 * total(x, y) / (N * M)


def products(x, y, bandwidths):
    return x @ x.T, y @ y.T, x @ y.T


def samples(N, D, device):
    generator = torch.Generator(device).manual_seed(0)
    x, y = torch.randn(2, N, D, device=device, generator=generator)
    return x, y * 1.1 + 0.1


def cases():
    for device, sizes in SIZES.items():
        for size in sizes:
            for step in ("forward", "forward + backward"):
                yield pytest.param(device, size, step, id=f"{step}-{size[0]}x{size[1]}-{device}")


@pytest.mark.parametrize(("place", "size", "step"), cases())
def test_mmd2(compare, device, pytestconfig, place, size, step):
    if place != device or (pytestconfig.getoption("--quick") and size != SIZES[device][0]):
        pytest.skip("of another device, or not of --quick")
    N, D = size
    x, y = samples(N, D, device)
    bandwidths = [D**0.5 * s for s in LADDER]
    training = step == "forward + backward"

    def make(function, x=x, y=y):
        def call():
            if not training:
                value = function(x, y, bandwidths)
                return value if isinstance(value, tuple) else (value,)
            leaf = x.detach().requires_grad_()
            value = function(leaf, y, bandwidths)
            return value.detach(), *torch.autograd.grad(value, leaf)

        return lambda: call

    def ours(x, y, bandwidths):
        return mmd2(x, y, bandwidth=bandwidths, validate=device == "cpu")

    with use_backend("reference"):
        expected = make(ours, x.double(), y.double())()()
    torch.compiler.reset()
    functions = {"cdist": by_cdist, "norms": by_norms, "torch.compile": torch.compile(by_norms, dynamic=False)}
    if importlib.util.find_spec("pykeops") and (device == "cuda" or N * N * D < 1e9):  # else a call takes a minute
        functions["KeOps"] = by_keops
    providers = [Provider(OURS, make(ours))] + [Provider(name, make(f)) for name, f in functions.items()]
    if not training:
        providers.append(Provider("products", make(products), floor=True))
    case = Case(
        "mmd", step, (N, N, D), torch.float32, bytes=(2 + training) * x.nbytes, expected=expected,
        flops=(2 + 3 * training) * 2 * N * N * D, yardstick="norms", rounding=1e-4,
    )  # fmt: skip
    compare(case, providers)


def test_memory(benchmark, device, recorder, pytestconfig):
    """What training holds beyond its inputs, for samples whose matrix of pairs would take 6.4 GB."""
    N, D = (500, 64) if pytestconfig.getoption("--quick") else (20000, 512)
    x, y = samples(N, D, device)

    def call():
        leaf = x.detach().requires_grad_()
        value = mmd2(leaf, y, bandwidth=[D**0.5 * s for s in LADDER])
        return torch.autograd.grad(value, leaf)

    if benchmark.disabled:
        assert call()[0].isfinite().all()
        return
    peak = peak_bytes(Provider(OURS, lambda: call), device)
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    row = {"op": "mmd", "pass": "memory of forward + backward", "shape": [N, N, D], "dtype": "float32"}
    row |= {"provider": OURS, "backend": "", "peak_bytes": peak, "samples": 1, "ratio": {}}
    row |= dict.fromkeys(("median_us", "q1_us", "q3_us"), 1e6 * seconds)
    recorder.add([row])
    benchmark.pedantic(lambda: None)


def by_numpy(x, y, rows, columns):
    """Subset by subset."""
    values = []
    for i, j in zip(rows, columns, strict=True):
        a, b = x[i], y[j]
        kxx, kyy, kxy = ((np.matmul(u, v.T) / u.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        m = len(i)
        within = sum((k.sum(1) - np.diagonal(k)).sum() for k in (kxx, kyy))
        values.append(within / (m * (m - 1)) - 2 * kxy.sum(0).sum() / (m * m))
    return np.mean(values), np.std(values)


class Through(nn.Module):
    """Features as they are, for torchmetrics."""

    def __init__(self, D):
        super().__init__()
        self.num_features = D

    def forward(self, x):
        return x


def torchmetrics_kid(x, y, subsets, size):
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = KernelInceptionDistance(Through(x.shape[1]), subsets=subsets, subset_size=size)
    metric = metric.to(x.device)
    metric.update(x, real=False)
    metric.update(y, real=True)
    return metric


def test_kid(benchmark, device, recorder, pytestconfig):
    quick = pytestconfig.getoption("--quick")
    N, D, S, m = (200, 64, 10, 50) if quick else (5000, 2048, 100, 1000)
    # Not negative, as Inception's features, and of two distributions that differ a little.
    x, y = (t.abs().mul_(0.5) for t in samples(N, D, device))
    rows, columns = _draw(N, N, S, m, 0)
    calls = {OURS: lambda: kid(x, y, subsets=S, subset_size=m)}
    calls["NumPy"] = functools.partial(by_numpy, x.cpu().numpy(), y.cpu().numpy(), rows.numpy(), columns.numpy())
    metric = torchmetrics_kid(x, y, S, m)

    def by_torchmetrics():
        metric._computed = None
        mean, deviation = metric.compute()
        return float(mean), float(deviation)

    calls["torchmetrics"] = by_torchmetrics
    found = {name: call() for name, call in calls.items()}
    exact = kid(x.double(), y.double(), subsets=S, subset_size=m) if not quick else found["NumPy"]
    assert abs(found[OURS][0] - exact[0]) <= 1e-8 + 1e-3 * abs(exact[0])
    assert abs(found["NumPy"][0] - exact[0]) <= 1e-2 * abs(exact[0])
    assert abs(found["torchmetrics"][0] - exact[0]) <= 6 * exact[1] / S**0.5  # subsets of its own
    if benchmark.disabled:
        return
    key = {"op": "mmd", "pass": f"KID, {S} subsets of {m}", "shape": [N, N, D], "dtype": "float32"}
    recorder.add(whole_steps(key, calls, device))
    benchmark.pedantic(calls[OURS])
