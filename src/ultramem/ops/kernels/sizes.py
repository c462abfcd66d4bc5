"""Whole numbers for launching kernels. Triton has the same functions, for use inside kernels: several µs for a call."""

from __future__ import annotations


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: int, divisor: int) -> int:
    """n / divisor, rounded up."""
    return -(-n // divisor)
