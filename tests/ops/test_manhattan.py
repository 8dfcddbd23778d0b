"""Distances, slopes and sums of signs against tensors [r, c, D]."""

import pytest
import torch
from grids import fits_a_gpu, noted_grids

from minegan_fast.ops.manhattan import manhattan_distance, manhattan_signs, manhattan_slopes

SIZES = [(1, 1, 1), (3, 5, 2), (70, 33, 64), (17, 40, 130), (2, 90, 65), (0, 4, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_against_all_differences(size, dtype, backend, device):
    if dtype == torch.float64 and manhattan_distance.lacks(backend, dtype=dtype):
        pytest.skip(f"{backend} takes no {dtype}")
    r, c, D = size
    p, q, hp, hq = (torch.randn(n, D, dtype=dtype, device=device) for n in (r, c, r, c))
    q[: min(r, c), ::2] = p[: min(r, c), ::2]  # ties, where the sign is 0
    A = torch.randn(c, r, dtype=dtype, device=device).T
    apart = p[:, None] - q
    close = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 1e-4 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(manhattan_distance(p, q), apart.abs().sum(2), **close)
    torch.testing.assert_close(manhattan_slopes(p, q, hp, hq), (apart.sign() * (hp[:, None] - hq)).sum(2), **close)
    torch.testing.assert_close(manhattan_signs(A, p, q), (A[..., None] * apart.sign()).sum(1), **close)
    torch.testing.assert_close(manhattan_signs(A.T, q, p), -(A[..., None] * apart.sign()).sum(0), **close)


def test_a_grid_fits_a_gpu_however_many_points_there_are(monkeypatch):
    pytest.importorskip("triton")
    from minegan_fast.kernels import manhattan as kernels

    grids = noted_grids(monkeypatch, kernels, ("pairs_kernel", "signs_kernel"))
    few, many, long = (torch.empty(size, device="meta") for size in ((2, 3), (2**23, 3), (2, 2**23)))
    kernels.pairs(few, many, None, None)
    kernels.signs(few, long, long)
    assert len(grids) == 2
    assert all(map(fits_a_gpu, grids))


@pytest.mark.parametrize("isa", [0, 1, 2])
def test_every_instruction_set(isa):
    native = pytest.importorskip("minegan_fast._C")
    best = native.cpu_isa()
    if isa > best:
        pytest.skip("this CPU has no such instruction set")
    p, q = torch.randn(40, 100), torch.randn(30, 100)
    native.set_cpu_isa(isa)
    try:
        torch.testing.assert_close(manhattan_distance(p, q, backend="cpp"), torch.cdist(p, q, p=1.0))
    finally:
        native.set_cpu_isa(best)
