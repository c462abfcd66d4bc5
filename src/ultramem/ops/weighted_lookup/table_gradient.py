"""The gradient of a table from what all lookups of a pass know, with Triton kernels.

All reads of a pass are sorted by row; runs of equal rows are summed in float32 and each row is written once. There are
no atomic operations: the result is the same from run to run, to the bit. Programs take chunks of equally many reads, so
that a row which very many tokens read is summed by many of them: runs that cross a chunk's border leave partial sums
behind, which a second kernel adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.kernels.launching import Launcher, ceil_div, next_power_of_2
from ultramem.ops.weighted_lookup.reads import Products, RowStep
from ultramem.ops.weighted_lookup.row_step import within, write_row

_CHUNK = 128


def table_gradients(
    products: list[Products],
    tables: Sequence[Tensor | None],
    sums: Sequence[Tensor | None] = (None, None),
    buffers: Sequence[Tensor | None] = (None, None),
) -> list[Tensor | None]:
    """Gradients of values and pre-values, in the tables' dtype; None for those that were not read.

    Args:
        products: what the lookups know.
        tables: values and pre-values; None for one that needs no gradient.
        sums: gradients that other lookups have summed up already, to be added, or None.
        buffers: tensors of the tables' shape and dtype to add to and return, or None for new ones.
    """
    groups = [list(group) for _, group in groupby(sorted(products, key=_shapes), key=_shapes)]
    read = [True, any(product.pre_inputs is not None for product in products)]
    gradients = [
        _gradient_to_add_to(table, total, buffer, len(groups) > 1)
        if table is not None and (is_read or total is not None or buffer is not None)
        else None
        for table, total, buffer, is_read in zip(tables, sums, buffers, read, strict=True)
    ]
    accumulate = any(added is not None for added in (*sums, *buffers))
    for group in groups:
        _sum(_joined(group), gradients, (None, None), accumulate=accumulate)
        accumulate = True
    return [
        None if gradient is None or table is None else gradient.to(table.dtype)
        for gradient, table in zip(gradients, tables, strict=True)
    ]


def _shapes(products: Products) -> list[tuple[int, ...]]:
    """What lookups must have in common to be summed together."""
    return [() if part is None else tuple(part.shape[1:]) for part in products]


def _filled(products: Products) -> list[Tensor]:
    return [products.rows.new_empty(0) if part is None else part for part in products]


def _gradient_to_add_to(table: Tensor, total: Tensor | None, buffer: Tensor | None, several: bool) -> Tensor:
    """A gradient, in float32 or wider if several lookups' sums will be added to it; zero but for what is given."""
    dtype = torch.promote_types(table.dtype, torch.float32) if several or total is not None else table.dtype
    if buffer is not None and buffer.dtype == dtype and buffer.is_contiguous():
        gradient, buffer = buffer, None
    else:
        gradient = torch.zeros_like(table, dtype=dtype, memory_format=torch.contiguous_format)
    for added in (total, buffer):
        if added is not None:
            gradient += added
    return gradient


def step_by_products(products: list[Products], steps: Sequence[RowStep | None]) -> bool:
    """Step values and pre-values by their gradient, which is made nowhere.

    Args:
        products: what the lookups know.
        steps: of the values and the pre-values; None for those that learn nothing.

    Returns:
        whether it was done: not where lookups differ in shape, and read the same rows in several goes.
    """
    if len({tuple(_shapes(product)) for product in products}) > 1:
        return False
    _sum(_joined(products), [step and step.parameter for step in steps], steps, accumulate=False)
    return True


def _joined(products: list[Products]) -> Products:
    """All that lookups of the same shapes know."""
    return Products(
        *(torch.cat(part) if len(part) > 1 else part[0] for part in zip(*map(_filled, products), strict=True))
    )


def _sum(
    products: Products, tables: Sequence[Tensor | None], steps: Sequence[RowStep | None], *, accumulate: bool
) -> None:
    """Sum the products of each row, and write the sums to gradients, or step the tables by them if there are steps."""
    rows, copies, weights, value_gradients, pre_weights, pre_inputs = products
    assert copies is not None
    assert pre_inputs is not None
    values, pre_values = tables
    if not pre_inputs.numel():
        pre_values = None
    present = [table for table in (values, pre_values) if table is not None]
    reads = rows.numel()
    if not reads or not present:
        return
    # Sorting 32-bit integers takes half the time.
    numbers = rows.flatten() if len(present[0]) > 2**31 - 1 else rows.flatten().to(torch.int32)
    sorted_rows, order = numbers.sort(stable=True)
    value_dim = 0 if values is None else values.shape[1]
    pre_value_dim = 0 if pre_values is None else pre_values.shape[1]
    chunks = ceil_div(reads, _CHUNK)
    partials = torch.empty(chunks, 2, value_dim + pre_value_dim, dtype=torch.float32, device=rows.device)
    given = [step for step in steps if step is not None]
    options = given[0].options() if given else (0, 0.0, 0.0, 0.0)
    written = values, pre_values, partials, *_numbers(steps[0]), *_numbers(steps[1]), *options
    sizes = {
        "CHUNK": _CHUNK,
        "VALUE_DIM": value_dim,
        "PRE_DIM": pre_value_dim,
        "BLOCK_V": next_power_of_2(max(value_dim, 1)),
        "BLOCK_P": next_power_of_2(max(pre_value_dim, 1)),
        "ACCUMULATE": accumulate,
        "STEP": bool(given),
        "num_warps": 1 if max(value_dim, pre_value_dim) <= 1024 else 4,
    }
    _sum_chunk_kernel(
        (chunks,), sorted_rows, order, weights, value_gradients, copies, pre_weights, pre_inputs, reads, rows.shape[1],
        value_gradients.shape[1], *written, CORES=weights.shape[2], HAS_COPIES=copies.numel() > 0, **sizes,
    )  # fmt: skip
    _sum_border_kernel((chunks,), sorted_rows, reads, *written, **sizes)


def _numbers(step: RowStep | None) -> tuple[Tensor | int | None, ...]:
    return (None,) * 5 if step is None else (step.squares, step.steps, step.means, step.copy, step.seed)


@triton.jit
def _contribution(
    position, order, weights, value_gradients, copies, pre_weights, pre_inputs, reads, k, gradient_width,
    value_columns, pre_columns, CORES: tl.constexpr, HAS_COPIES: tl.constexpr,
    VALUE_DIM: tl.constexpr, PRE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """What one read adds to its row's values and pre-values; nothing beyond the last read."""
    inside = position < reads
    read = tl.load(order + position, inside, 0)
    token = read // k
    value = tl.zeros([BLOCK_V], tl.float32)
    if VALUE_DIM > 0:
        start = token * gradient_width
        if HAS_COPIES:
            start += tl.load(copies + read, inside, 0) * VALUE_DIM
        gradient = tl.load(value_gradients + start + value_columns, within(value_columns, VALUE_DIM, inside), 0.0)
        weight = tl.load(weights + read * CORES)
        weight_of_column = tl.zeros([BLOCK_V], tl.float32) + weight
        for core in tl.static_range(1, CORES):
            weight = tl.load(weights + read * CORES + core)
            weight_of_column = tl.where(value_columns >= core * (VALUE_DIM // CORES), weight, weight_of_column)
        value = gradient.to(tl.float32) * weight_of_column
    pre_value = tl.zeros([BLOCK_P], tl.float32)
    if PRE_DIM > 0:
        pre_input = tl.load(pre_inputs + token * PRE_DIM + pre_columns, within(pre_columns, PRE_DIM, inside), 0.0)
        pre_value = pre_input.to(tl.float32) * tl.load(pre_weights + read)
    return value, pre_value


@triton.jit
def _write_sum(
    table, row, columns, total, write, squares, steps, means, copy, seed, copy_stride, lr, log_beta, eps,
    DIM: tl.constexpr, ACCUMULATE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write a row's sum to the gradient, or step the row by it."""
    if DIM > 0:
        if STEP:
            write_row(
                table,
                row,
                columns,
                total,
                write,
                squares,
                steps,
                means,
                copy,
                seed,
                copy_stride,
                lr,
                log_beta,
                eps,
                DIM,
            )
        else:
            places = table + row.to(tl.int64) * DIM + columns
            mask = within(columns, DIM, write)
            if ACCUMULATE:
                total += tl.load(places, mask, 0.0).to(tl.float32)
            tl.store(places, total, mask)


@triton.jit
def _store_partial(partial, value_columns, pre_columns, value, pre_value, write,
                   VALUE_DIM: tl.constexpr, PRE_DIM: tl.constexpr):  # fmt: skip
    if VALUE_DIM > 0:
        tl.store(partial + value_columns, value, within(value_columns, VALUE_DIM, write))
    if PRE_DIM > 0:
        tl.store(partial + VALUE_DIM + pre_columns, pre_value, within(pre_columns, PRE_DIM, write))


@triton.jit
def _write_sums(
    values, pre_values, row, value_columns, pre_columns, value, pre_value, write,
    value_squares, value_steps, value_means, value_copy, value_seed,
    pre_squares, pre_steps, pre_means, pre_copy, pre_seed, copy_stride, lr, log_beta, eps,
    VALUE_DIM: tl.constexpr, PRE_DIM: tl.constexpr, ACCUMULATE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    _write_sum(
        values, row, value_columns, value, write, value_squares, value_steps, value_means, value_copy, value_seed,
        copy_stride, lr, log_beta, eps, VALUE_DIM, ACCUMULATE, STEP,
    )  # fmt: skip
    _write_sum(
        pre_values, row, pre_columns, pre_value, write, pre_squares, pre_steps, pre_means, pre_copy, pre_seed,
        copy_stride, lr, log_beta, eps, PRE_DIM, ACCUMULATE, STEP,
    )  # fmt: skip


@triton.jit
def _finish_read(
    position, rows, first_row, continued, value, pre_value, values, pre_values, partial, reads,
    value_columns, pre_columns, value_squares, value_steps, value_means, value_copy, value_seed,
    pre_squares, pre_steps, pre_means, pre_copy, pre_seed, copy_stride, lr, log_beta, eps,
    VALUE_DIM: tl.constexpr, PRE_DIM: tl.constexpr, ACCUMULATE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Where a run of equal rows ends, write its sum: to the row, or as a partial sum if it began before the chunk."""
    row = tl.load(rows + position, position < reads, -1)
    following = tl.load(rows + position + 1, position + 1 < reads, -1)
    ends = (position < reads) & (row != following)
    began_before = continued & (row == first_row)
    _write_sums(
        values, pre_values, row, value_columns, pre_columns, value, pre_value, ends & (began_before == 0),
        value_squares, value_steps, value_means, value_copy, value_seed,
        pre_squares, pre_steps, pre_means, pre_copy, pre_seed, copy_stride, lr, log_beta, eps,
        VALUE_DIM, PRE_DIM, ACCUMULATE, STEP,
    )  # fmt: skip
    _store_partial(partial, value_columns, pre_columns, value, pre_value, ends & began_before, VALUE_DIM, PRE_DIM)
    return tl.where(ends, 0.0, value), tl.where(ends, 0.0, pre_value)


@Launcher
@triton.jit
def _sum_chunk_kernel(
    rows, order, weights, value_gradients, copies, pre_weights, pre_inputs, reads, k, gradient_width,
    values, pre_values, partials, value_squares, value_steps, value_means, value_copy, value_seed,
    pre_squares, pre_steps, pre_means, pre_copy, pre_seed, copy_stride, lr, log_beta, eps,
    CORES: tl.constexpr, HAS_COPIES: tl.constexpr, CHUNK: tl.constexpr,
    VALUE_DIM: tl.constexpr, PRE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
    ACCUMULATE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sum a chunk of sorted reads.

    The first partial sum is of a run that began before, the second of one that goes on.
    """
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * CHUNK
    value_columns, pre_columns = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_P)
    first_row = tl.load(rows + begin)
    continued = tl.load(rows + begin - 1, begin > 0, -1) == first_row
    partial = partials + chunk * 2 * (VALUE_DIM + PRE_DIM)
    value, pre_value = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_P], tl.float32)
    for offset in range(0, CHUNK, 4):
        position = begin + offset
        # All loads of four reads are under way before the first is needed.
        value_0, pre_value_0 = _contribution(
            position, order, weights, value_gradients, copies, pre_weights, pre_inputs, reads, k, gradient_width,
            value_columns, pre_columns, CORES, HAS_COPIES, VALUE_DIM, PRE_DIM, BLOCK_V, BLOCK_P,
        )  # fmt: skip
        value_1, pre_value_1 = _contribution(
            position + 1, order, weights, value_gradients, copies, pre_weights, pre_inputs, reads, k, gradient_width,
            value_columns, pre_columns, CORES, HAS_COPIES, VALUE_DIM, PRE_DIM, BLOCK_V, BLOCK_P,
        )  # fmt: skip
        value_2, pre_value_2 = _contribution(
            position + 2, order, weights, value_gradients, copies, pre_weights, pre_inputs, reads, k, gradient_width,
            value_columns, pre_columns, CORES, HAS_COPIES, VALUE_DIM, PRE_DIM, BLOCK_V, BLOCK_P,
        )  # fmt: skip
        value_3, pre_value_3 = _contribution(
            position + 3, order, weights, value_gradients, copies, pre_weights, pre_inputs, reads, k, gradient_width,
            value_columns, pre_columns, CORES, HAS_COPIES, VALUE_DIM, PRE_DIM, BLOCK_V, BLOCK_P,
        )  # fmt: skip
        value, pre_value = _finish_read(
            position, rows, first_row, continued, value + value_0, pre_value + pre_value_0, values, pre_values,
            partial,
            reads, value_columns, pre_columns, value_squares, value_steps, value_means, value_copy, value_seed,
            pre_squares, pre_steps, pre_means, pre_copy, pre_seed, copy_stride, lr, log_beta, eps, VALUE_DIM, PRE_DIM,
            ACCUMULATE, STEP,
        )  # fmt: skip
        value, pre_value = _finish_read(
            position + 1, rows, first_row, continued, value + value_1, pre_value + pre_value_1, values, pre_values,
            partial,
            reads, value_columns, pre_columns, value_squares, value_steps, value_means, value_copy, value_seed,
            pre_squares, pre_steps, pre_means, pre_copy, pre_seed, copy_stride, lr, log_beta, eps, VALUE_DIM, PRE_DIM,
            ACCUMULATE, STEP,
        )  # fmt: skip
        value, pre_value = _finish_read(
            position + 2, rows, first_row, continued, value + value_2, pre_value + pre_value_2, values, pre_values,
            partial,
            reads, value_columns, pre_columns, value_squares, value_steps, value_means, value_copy, value_seed,
            pre_squares, pre_steps, pre_means, pre_copy, pre_seed, copy_stride, lr, log_beta, eps, VALUE_DIM, PRE_DIM,
            ACCUMULATE, STEP,
        )  # fmt: skip
        value, pre_value = _finish_read(
            position + 3, rows, first_row, continued, value + value_3, pre_value + pre_value_3, values, pre_values,
            partial,
            reads, value_columns, pre_columns, value_squares, value_steps, value_means, value_copy, value_seed,
            pre_squares, pre_steps, pre_means, pre_copy, pre_seed, copy_stride, lr, log_beta, eps, VALUE_DIM, PRE_DIM,
            ACCUMULATE, STEP,
        )  # fmt: skip
    last = begin + CHUNK - 1
    row = tl.load(rows + last, last < reads, -1)
    goes_on = (last + 1 < reads) & (row == tl.load(rows + last + 1, last + 1 < reads, -2))
    whole = continued & (row == first_row)
    place = partial + tl.where(whole, 0, VALUE_DIM + PRE_DIM)
    _store_partial(place, value_columns, pre_columns, value, pre_value, goes_on, VALUE_DIM, PRE_DIM)


@Launcher
@triton.jit
def _sum_border_kernel(
    rows, reads, values, pre_values, partials, value_squares, value_steps, value_means, value_copy, value_seed,
    pre_squares, pre_steps, pre_means, pre_copy, pre_seed, copy_stride, lr, log_beta, eps, CHUNK: tl.constexpr,
    VALUE_DIM: tl.constexpr, PRE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
    ACCUMULATE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of the run that begins in this chunk and goes on, if there is one."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * CHUNK
    first_row = tl.load(rows + begin)
    next_begin = begin + CHUNK
    row = tl.load(rows + next_begin - 1, next_begin - 1 < reads, -1)
    goes_on = (next_begin < reads) & (row == tl.load(rows + next_begin, next_begin < reads, -2))
    began_before = (tl.load(rows + begin - 1, begin > 0, -1) == first_row) & (row == first_row)
    if goes_on & (began_before == 0):
        end = next_begin
        while (end < reads) & (row == tl.load(rows + end, end < reads, -2)):
            end += CHUNK
        value_columns, pre_columns = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_P)
        width = VALUE_DIM + PRE_DIM
        partial = partials + chunk * 2 * width + width
        value = tl.load(partial + value_columns, value_columns < VALUE_DIM, 0.0)
        pre_value = tl.load(partial + VALUE_DIM + pre_columns, pre_columns < PRE_DIM, 0.0)
        while next_begin < end:
            partial = partials + next_begin // CHUNK * 2 * width
            value += tl.load(partial + value_columns, value_columns < VALUE_DIM, 0.0)
            pre_value += tl.load(partial + VALUE_DIM + pre_columns, pre_columns < PRE_DIM, 0.0)
            next_begin += CHUNK
        _write_sums(
            values, pre_values, row, value_columns, pre_columns, value, pre_value, goes_on,
            value_squares, value_steps, value_means, value_copy, value_seed,
            pre_squares, pre_steps, pre_means, pre_copy, pre_seed, copy_stride, lr, log_beta, eps,
            VALUE_DIM, PRE_DIM, ACCUMULATE, STEP,
        )  # fmt: skip
