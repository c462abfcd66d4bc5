"""From the scores of all keys to the rows that are read: one program of several warps for each token and head.

It holds all scores of an axis in registers, then all cells of the grid of both axes' candidates, and finds the best by
a threshold, as `ultramem.ops.kernels.selection` says. Nothing is sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.choose_reads.grid import Grid
from ultramem.ops.kernels.launching import Launcher, next_power_of_2
from ultramem.ops.kernels.overlapping import can_overlap, wait_for_others
from ultramem.ops.kernels.selection import LIMIT, distance, find_threshold, finite, from_ordered, next_probe, to_ordered

MOST_CANDIDATES = 128  # whose grid the registers hold


@triton.jit
def _count(probe, numbers):
    return tl.sum((numbers >= probe).to(tl.int32))


@triton.jit
def _count_both(first_probe, second_probe, first, second):
    """How many of the first and of the second numbers reach their probes, by one sum: that is what takes the time."""
    marks = (first >= first_probe).to(tl.int32) + ((second >= second_probe).to(tl.int32) << 16)
    counts = tl.sum(marks)
    return counts & 65535, counts >> 16


@triton.jit
def _narrowed(is_open, probe, count, low, high, count_low, count_high, k):
    """The bounds of an open search after a probe; those of another stay."""
    raised, lowered = is_open & (count >= k), is_open & (count < k)
    low, count_low = tl.where(raised, probe, low), tl.where(raised, count, count_low)
    high, count_high = tl.where(lowered, probe, high), tl.where(lowered, count, count_high)
    return low, high, count_low, count_high


@triton.jit
def _find_both(first, second, low_1, low_2, k):
    """Two searches for the best k numbers at once, each as `find_threshold`; its three results for each."""
    high_1, high_2 = from_ordered(to_ordered(tl.max(first)) + 1), from_ordered(to_ordered(tl.max(second)) + 1)
    count_low_1, count_low_2 = _count_both(low_1, low_2, first, second)
    count_high_1, count_high_2 = count_low_1 * 0, count_low_2 * 0
    open_1 = (count_low_1 > k) & (distance(low_1, high_1) > 1)
    open_2 = (count_low_2 > k) & (distance(low_2, high_2) > 1)
    passes = 0
    while open_1 | open_2:
        probe_1 = next_probe(low_1, high_1, count_low_1, count_high_1, k, passes, 1)
        probe_2 = next_probe(low_2, high_2, count_low_2, count_high_2, k, passes, 1)
        count_1, count_2 = _count_both(probe_1, probe_2, first, second)
        low_1, high_1, count_low_1, count_high_1 = _narrowed(
            open_1, probe_1, count_1, low_1, high_1, count_low_1, count_high_1, k
        )
        low_2, high_2, count_low_2, count_high_2 = _narrowed(
            open_2, probe_2, count_2, low_2, high_2, count_low_2, count_high_2, k
        )
        open_1 = (count_low_1 > k) & (distance(low_1, high_1) > 1)
        open_2 = (count_low_2 > k) & (distance(low_2, high_2) > 1)
        passes += 1
    exact_1, exact_2 = count_low_1 == k, count_low_2 == k
    high_1, count_high_1 = tl.where(exact_1, low_1, high_1), tl.where(exact_1, k, count_high_1)
    high_2, count_high_2 = tl.where(exact_2, low_2, high_2), tl.where(exact_2, k, count_high_2)
    return low_1, high_1, count_high_1, low_2, high_2, count_high_2


@triton.jit
def _places(numbers, low, high, count_high, k):
    """Places from 0 to k - 1 for the best k numbers, row by row; k for others. The bounds are of `find_threshold`."""
    best, tied = numbers >= high, (numbers >= low) & (numbers < high)
    marks = best.to(tl.int32) + (tied.to(tl.int32) << 16)  # one scan for both: neither fills 16 bits
    of_rows = tl.sum(marks, axis=1)
    before = tl.cumsum(marks, axis=1) - marks + (tl.cumsum(of_rows, axis=0) - of_rows)[:, None]
    place = tl.where(best, before & 65535, count_high + (before >> 16))
    return tl.where((best | tied) & (place < k), place, k)


@triton.jit
def _lowest(best):
    """The lowest number that is not -inf, the mark of padding."""
    return tl.min(tl.where(best == -float("inf"), LIMIT * LIMIT, best))


@triton.jit
def _load_axis(
    scores, rank_stride, directions, num_keys,
    RANK: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The scores of an axis' keys, row by row, summed over ranks with the direction's weights; -inf beyond the last."""
    key = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = key < num_keys
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for rank in tl.static_range(RANK):
        weight = tl.load(directions + rank) if WEIGHTED else 1.0
        total += weight * tl.load(scores + rank * rank_stride + key, mask, 0.0).to(tl.float32)
    return tl.where(mask, finite(total), -float("inf"))


@triton.jit
def _write_keys(
    place, scores, rank_stride, k, chosen, chosen_scores,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the keys that have a place below k, and their scores in all ranks."""
    key = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(chosen + place, key, place < k)
    for rank in tl.static_range(RANK):
        score = tl.load(scores + rank * rank_stride + key, place < k, 0.0)
        tl.store(chosen_scores + rank * k + place, score.to(tl.float32), place < k)


@triton.jit
def _choose_keys(
    scores, axis_stride, rank_stride, u, t, num_keys, k, chosen, chosen_scores,
    RANK: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the best k keys of both axes, in any order."""
    columns = scores + axis_stride
    first = _load_axis(scores, rank_stride, u, num_keys, RANK, WEIGHTED, ROWS, COLUMNS)
    second = _load_axis(columns, rank_stride, t, num_keys, RANK, WEIGHTED, ROWS, COLUMNS)
    # Each column has a key, or each key a column: k numbers or more reach the lowest of their maxima.
    low_1, low_2 = _lowest(tl.max(first, axis=0)), _lowest(tl.max(second, axis=0))
    low_1, high_1, count_high_1, low_2, high_2, count_high_2 = _find_both(first, second, low_1, low_2, k)
    place = _places(first, low_1, high_1, count_high_1, k)
    _write_keys(place, scores, rank_stride, k, chosen, chosen_scores, RANK, ROWS, COLUMNS)
    place = _places(second, low_2, high_2, count_high_2, k)
    _write_keys(place, columns, rank_stride, k, chosen + k, chosen_scores + RANK * k, RANK, ROWS, COLUMNS)


@triton.jit
def _cells(
    rows, columns, cores, head, heads, candidates,
    RANK: tl.constexpr, WEIGHTED: tl.constexpr, CORES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The scores of all cells of the candidates' grid; -inf beyond its edge."""
    number = tl.arange(0, BLOCK_C)
    mask = number < candidates
    cells = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    if WEIGHTED:
        for other in tl.static_range(RANK):
            row = tl.zeros([BLOCK_C], tl.float32)
            for rank in tl.static_range(RANK):
                weight = 0.0
                for core in tl.static_range(CORES):
                    weight += tl.load(cores + ((core * heads + head) * RANK + rank) * RANK + other)
                row += weight * tl.load(rows + rank * candidates + number, mask, 0.0)
            column = finite(tl.load(columns + other * candidates + number, mask, 0.0))
            cells += finite(row)[:, None] * column[None, :]
    else:
        cells += finite(tl.load(rows + number, mask, 0.0))[:, None]
        cells += finite(tl.load(columns + number, mask, 0.0))[None, :]
    return tl.where(mask[:, None] & mask[None, :], cells, -float("inf"))


@triton.jit
def _write_scores(
    rows, columns, row, column, candidates, cores, head, heads, scores, mask,
    RANK: tl.constexpr, WEIGHTED: tl.constexpr, CORES: tl.constexpr,
):  # fmt: skip
    """Write the scores of chosen cells: one for each core, or a softmax over sums."""
    if WEIGHTED:
        for core in tl.static_range(CORES):
            total = tl.zeros(mask.shape, tl.float32)
            for rank in tl.static_range(RANK):
                row_score = tl.load(rows + rank * candidates + row, mask, 0.0)
                for other in tl.static_range(RANK):
                    weight = tl.load(cores + ((core * heads + head) * RANK + rank) * RANK + other)
                    total += row_score * weight * tl.load(columns + other * candidates + column, mask, 0.0)
            tl.store(scores + core, total, mask)
    else:
        total = tl.load(rows + row, mask, 0.0) + tl.load(columns + column, mask, 0.0)
        powers = tl.where(mask, tl.exp(total - tl.max(tl.where(mask, total, -float("inf")))), 0.0)
        tl.store(scores, powers / tl.sum(powers), mask)


@Launcher
@triton.jit(do_not_specialize=["window_start"])
def _selection_kernel(
    axis_scores, axis_stride, rank_stride, head_stride, token_stride, u, t, cores, shuffle, chosen, chosen_scores,
    cell_numbers, rows, copies, scores, heads, num_keys, candidates, k, window_start, window_rows, table_rows,
    RANK: tl.constexpr, WEIGHTED: tl.constexpr, CORES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, MORE_CELLS: tl.constexpr, EXPANDED: tl.constexpr,
    HAS_COPIES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """The reads of one token and head. `chosen`, `chosen_scores` and `cell_numbers` are for its own use."""
    wait_for_others(OVERLAPS)
    program = tl.program_id(0).to(tl.int64)
    token, head = program // heads, program % heads
    axis_scores += token * token_stride + head * head_stride
    chosen += program * 2 * candidates
    chosen_scores += program * 2 * RANK * candidates
    if WEIGHTED:
        u += head * RANK
        t += head * RANK
    _choose_keys(
        axis_scores, axis_stride, rank_stride, u, t, num_keys, candidates, chosen, chosen_scores,
        RANK, WEIGHTED, ROWS, COLUMNS,
    )  # fmt: skip
    tl.debug_barrier()

    columns = chosen_scores + RANK * candidates
    cells = _cells(chosen_scores, columns, cores, head, heads, candidates, RANK, WEIGHTED, CORES, BLOCK_C)
    low = _lowest(cells) if MORE_CELLS else _lowest(tl.max(cells, axis=0))
    count_low = _count(low, cells)
    low, high, count_high = find_threshold(_count, (cells,), low, tl.max(cells), count_low, k, k, 1)
    place = _places(cells, low, high, count_high, k)
    number = tl.arange(0, BLOCK_C)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    cell_numbers += program * k
    tl.store(cell_numbers + place, number, place < k)
    tl.debug_barrier()

    order = tl.arange(0, BLOCK_K)
    mask = order < k
    cell = tl.load(cell_numbers + order, mask, 0)
    row, column = cell // BLOCK_C, cell % BLOCK_C
    virtual = tl.load(chosen + row, mask, 0) * num_keys + tl.load(chosen + candidates + column, mask, 0)
    if shuffle is not None:
        virtual = tl.load(shuffle + virtual, mask, 0).to(tl.int32)
    if HAS_COPIES:
        tl.store(copies + program * k + order, (virtual // window_rows).to(tl.int64), mask)
    if EXPANDED:
        virtual = virtual % window_rows
    table_row = virtual.to(tl.int64) + window_start
    tl.store(rows + program * k + order, tl.where(table_row < table_rows, table_row, table_row - table_rows), mask)
    _write_scores(
        chosen_scores, columns, row, column, candidates, cores, head, heads,
        scores + (program * k + order) * CORES, mask, RANK, WEIGHTED, CORES,
    )  # fmt: skip


def select_reads(axis_scores: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows, scores and virtual copies as in `choose_reads`, from scores (2, rank, heads, tokens, keys of the grid)."""
    sizes, tokens = grid.sizes, axis_scores.shape[3]
    programs, cores = tokens * sizes.heads, 1 if grid.cores is None else grid.cores.shape[0]
    new = axis_scores.new_empty
    rows = new((tokens, sizes.heads * sizes.k), dtype=torch.int64)
    copies = torch.empty_like(rows) if grid.separate_copies else None
    scores = new((*rows.shape, cores), dtype=torch.float32)
    chosen = new(programs * (2 * sizes.axis_k + sizes.k), dtype=torch.int32)
    chosen_scores = new(programs * 2 * sizes.rank * sizes.axis_k, dtype=torch.float32)
    columns, block_c = next_power_of_2(sizes.axis_k), max(next_power_of_2(sizes.axis_k), 16)
    _selection_kernel(
        (programs,), axis_scores, *axis_scores.stride()[:4], grid.u, grid.t, grid.cores, grid.shuffle, chosen,
        chosen_scores, chosen[programs * 2 * sizes.axis_k :], rows, copies, scores, sizes.heads, sizes.num_keys,
        sizes.axis_k, sizes.k, grid.window_start, grid.window_rows, grid.table_rows,
        RANK=sizes.rank, WEIGHTED=grid.cores is not None, CORES=cores,
        ROWS=next_power_of_2(sizes.num_keys) // columns, COLUMNS=columns, BLOCK_C=block_c,
        BLOCK_K=next_power_of_2(sizes.k), MORE_CELLS=sizes.k > sizes.axis_k,
        EXPANDED=grid.window_rows < sizes.num_keys**2, HAS_COPIES=grid.separate_copies,
        OVERLAPS=can_overlap(axis_scores.device),
        num_warps=8 if max(block_c**2, sizes.num_keys) > 4096 else 4,
    )  # fmt: skip
    return rows, scores, copies
