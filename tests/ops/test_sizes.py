"""Sizes of tiles and grids, which are those that Triton's own functions give."""

import pytest

triton = pytest.importorskip("triton")

from minegan_fast.kernels._sizes import cdiv, power_of_2  # noqa: E402


def test_equal_to_tritons():
    for n in (1, 2, 3, 4, 5, 31, 32, 33, 1023, 1024, 1025, 2**31 - 1, 2**31 + 1):
        assert power_of_2(n) == triton.next_power_of_2(n)
        for size in (1, 3, 64):
            assert cdiv(n, size) == triton.cdiv(n, size)


def test_of_nothing():
    assert cdiv(0, 64) == 0
    assert power_of_2(0) == 1
