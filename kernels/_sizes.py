"""Sizes of tiles and grids. Triton's own functions of these names take two microseconds a call on the host."""


def cdiv(n: int, size: int) -> int:
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
