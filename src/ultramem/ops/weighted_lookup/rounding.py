"""Stochastic rounding to bfloat16, whose random bits are computed and not drawn.

A table in bfloat16 would lose every change of less than half a unit of its last place, 2^-9 to 2^-8 of the value.
Rounded up or down at random, with the probability of the distance to the other, a value is right on average
(arXiv:1502.02551).

The bits depend on what is rounded alone: the part of the table, the row, its own number of steps, and the column. So
nothing needs to be saved, and processes that step the same row round it alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: consecutive multiples lie far apart
_MASK = 0xFFFFFFFF


def part_seed(seed: int, number: int, first_row: int = 0) -> int:
    """The seed of a table's values or pre-values, an int32.

    Args:
        seed: of all.
        number: of the values or pre-values among all.
        first_row: of the whole table, where rows from there on are counted from 0.
    """
    # Odd but for shards, as Triton makes another kernel for a multiple of 16.
    mixed = _mix((_mix((seed + _GOLDEN) & _MASK) + number) & _MASK) | 1
    mixed = (mixed + first_row * _GOLDEN) & _MASK
    return mixed - 2**32 if mixed >= 2**31 else mixed


def random_bits(seed: int, rows: Tensor, steps: Tensor, width: int) -> Tensor:
    """Numbers (n, width), int64, uniform in [0, 2^32): 32-bit unsigned arithmetic, which wraps around.

    Args:
        seed: of the values or pre-values, as from `part_seed`.
        rows: (n,), int64, numbers of rows.
        steps: (n,), number of the steps of each.
        width: of a row.
    """
    of_rows = _mix((rows * _GOLDEN + seed) & _MASK)
    of_steps = _mix(of_rows ^ ((steps.to(torch.int64) * _GOLDEN) & _MASK))
    columns = torch.arange(width, device=rows.device) * _GOLDEN
    return _mix((of_steps.unsqueeze(1) + columns) & _MASK)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Values, float32, rounded to bfloat16: the upper half of `bits` (32 bits) is added to the half that is cut off.

    Values that are not finite stay so. Those beyond the largest number of bfloat16 may become infinite.
    """
    pattern = values.view(torch.int32).to(torch.int64) & _MASK
    rounded = pattern + torch.where(values.isfinite(), bits >> 16, 0)
    return (rounded >> 16).to(torch.int16).view(torch.bfloat16)


def _mix(x: Any) -> Any:
    """The hash lowbias32 of C. Wellons (github.com/skeeto/hash-prospector) of an int or a tensor, a bijection."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    # The multiplier minus 2^32, with which products of 64 bits do not overflow.
    x = (x * (0x846CA68B - 2**32)) & _MASK
    return x ^ (x >> 16)
