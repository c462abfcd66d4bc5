"""One step of the row-wise optimizer, with Triton kernels: for each row, as its gradient is known, or from gradients.

The definition is `step_rows` in `naive.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.kernels.launching import Launcher, ceil_div, next_power_of_2
from ultramem.ops.weighted_lookup.reads import RowStep

_ROWS = 4  # of a program


def step_rows(step: RowStep, gradient: Tensor) -> None:
    """As the definition in `naive.py`; the gradient is contiguous."""
    rows, width = step.parameter.shape
    _step_rows_kernel(
        (ceil_div(rows, _ROWS),), step.parameter, gradient, step.squares, step.steps, step.means, step.copy, step.seed,
        *step.options(), rows, ROWS=_ROWS, WIDTH=width,
        BLOCK=next_power_of_2(width), num_warps=1 if width <= 1024 else 4,
    )  # fmt: skip


@triton.jit
def within(columns, WIDTH: tl.constexpr, condition):
    """`condition & (columns < WIDTH)`, which Triton 3.9's interpreter does not take for a mask."""
    return (columns * 0 + condition.to(tl.int32) == 1) & (columns < WIDTH)


@triton.jit
def _mix(x):
    """`_mix` of `rounding.py`, of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(seed, row, step, columns):
    """As `random_bits` of `rounding.py`, for one row: (columns,), uint32."""
    of_row = _mix(row.to(tl.uint32) * 0x9E3779B9 + seed)
    of_step = _mix(of_row ^ (step.to(tl.uint32) * 0x9E3779B9))
    return _mix(columns.to(tl.uint32) * 0x9E3779B9 + of_step)


@triton.jit
def round_stochastically(values, bits):
    """As in `rounding.py`."""
    pattern = values.to(tl.uint32, bitcast=True)
    noise = tl.where((pattern & 0x7F800000) == 0x7F800000, 0, bits >> 16)
    return ((pattern + noise) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def write_row(
    parameter, row, columns, gradient, write, squares, steps, means, copy, seed, copy_stride, lr, log_beta, eps,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Step a row by its gradient (columns,), in float32, which is zero beyond the width."""
    mean, row = tl.sum(gradient * gradient) / WIDTH, row.to(tl.int64)
    if write:
        tl.store(means + row, mean)  # also one that is not a number, by which no row is stepped
    if write & (mean > 0):
        step = tl.load(steps + row) + 1.0
        square = tl.load(squares + row)
        square += (1.0 - tl.exp(log_beta)) * (mean - square)
        factor = lr / (tl.sqrt(square / (1.0 - tl.exp(step * log_beta))) + eps)
        places = parameter + row * WIDTH + columns
        value = tl.load(places, columns < WIDTH, 0.0).to(tl.float32) - factor * gradient
        if seed is not None:
            value = round_stochastically(value, random_bits(seed, row, step, columns))
        tl.store(places, value, columns < WIDTH)
        if copy is not None:
            tl.store(copy + row * copy_stride + columns, value, columns < WIDTH)
        tl.store(steps + row, step)
        tl.store(squares + row, square)


@Launcher
@triton.jit
def _step_rows_kernel(
    parameter, gradients, squares, steps, means, copy, seed, copy_stride, lr, log_beta, eps, rows,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    for i in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        inside = row < rows
        gradient = tl.load(gradients + row * WIDTH + columns, within(columns, WIDTH, inside), 0.0).to(tl.float32)
        write_row(
            parameter, row, columns, gradient, inside, squares, steps, means, copy, seed, copy_stride, lr, log_beta,
            eps, WIDTH,
        )  # fmt: skip
