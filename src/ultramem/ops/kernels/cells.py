"""The best k cells of the grid of two axes' candidates.

Cells are bilinear in the scores of their row and column (Tucker), or sums (product keys). A program, one warp, serves
one token and head: it makes the grid tile by tile, in registers, and writes nothing but the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.kernels.candidates import best_keys
from ultramem.ops.kernels.launching import Launcher, ceil_div, next_power_of_2
from ultramem.ops.kernels.selection import LIMIT, column_bits, find_threshold, finite, write_chosen

MAX_CANDIDATES = 256  # eight tiles each way, of which a word has a bit for each
TILE = tl.constexpr(32)


@triton.jit
def _tile(
    row_tile, column_tile, rows, columns, candidates, RANK: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr
):
    """Scores of one tile of the grid; -inf beyond its edge.

    Bit for bit the same wherever it is inlined, so that as many cells are written as were counted: the compiler has no
    choice between fused and separate operations.
    """
    i, j = tl.arange(0, TILE) + row_tile * TILE, tl.arange(0, TILE) + column_tile * TILE
    row_mask = i < candidates if MASKED else None
    column_mask = j < candidates if MASKED else None
    cells = finite(tl.load(rows + i, row_mask))[:, None]
    column = finite(tl.load(columns + j, column_mask))[None, :]
    cells = cells * column if WEIGHTED else cells + column
    for rank in tl.static_range(1, RANK):
        row = finite(tl.load(rows + rank * candidates + i, row_mask))
        column = finite(tl.load(columns + rank * candidates + j, column_mask))
        row, column = tl.broadcast(row[:, None], column[None, :])
        cells = tl.fma(row, column, cells)
    if MASKED:
        cells = tl.where((i < candidates)[:, None] & (j < candidates)[None, :], cells, -float("inf"))
    return cells


@triton.jit
def _count_in_tile(probe, cells):
    return tl.sum(tl.sum((cells >= probe).to(tl.int32), axis=0))


@triton.jit
def _count_cells(
    probe, first, live, rows, columns, candidates, RANK: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """How many cells of the live tiles reach the probe."""
    counts = tl.sum((first >= probe).to(tl.int32), axis=0)
    for tile in range(1, TILES * TILES):
        if (live >> tile) & 1 == 1:
            cells = _tile(tile // TILES, tile % TILES, rows, columns, candidates, RANK, WEIGHTED, MASKED)
            counts += tl.sum((cells >= probe).to(tl.int32), axis=0)
    return tl.sum(counts)


@triton.jit
def _bounds(
    first, rows, columns, candidates, k, RANK: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """A number that at least k cells reach, the highest cell, and a bit for each tile with a cell between the two."""
    best_of_columns = tl.max(first, axis=0)
    highest = tl.max(best_of_columns)
    live = tl.full([], 1, tl.int64)
    if TILES == 1:
        if k <= candidates:  # each column has a best cell
            low = tl.min(tl.where(best_of_columns == -float("inf"), LIMIT * LIMIT, best_of_columns))
        else:
            low = tl.min(tl.min(tl.where(first == -float("inf"), LIMIT * LIMIT, first), axis=0))
    else:
        # Candidates are in order, and the best cells among the best rows and columns: a bound that k cells of the first
        # tile reach excludes most other tiles.
        lowest = tl.min(tl.min(first, axis=0))
        count = TILE * TILE
        low, _, _ = find_threshold(_count_in_tile, (first,), lowest, highest, count, k, k + k // 8, 1)
        for tile in range(1, TILES * TILES):
            cells = _tile(tile // TILES, tile % TILES, rows, columns, candidates, RANK, WEIGHTED, MASKED)
            best = tl.max(tl.max(cells, axis=0))
            highest = tl.maximum(highest, best)
            live |= (best >= low).to(tl.int64) << tile
    return low, highest, live


@triton.jit
def _write_best(
    low, high, count_high, k, out, first, live, rows, columns, candidates, RANK: tl.constexpr, WEIGHTED: tl.constexpr,
    MASKED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the numbers of the cells that reach `high`, which are `count_high`, and of some between, k in all."""
    place = 0
    tie_place = count_high
    for tile in range(TILES * TILES):
        if (live >> tile) & 1 == 1:
            cells = first
            if TILES > 1:
                cells = _tile(tile // TILES, tile % TILES, rows, columns, candidates, RANK, WEIGHTED, MASKED)
            base = tile // TILES * TILE * candidates + tile % TILES * TILE
            words = column_bits(cells >= high, 0)
            place = write_chosen(words, base, candidates, place, k, out, TILE)
            if tie_place < k:
                words = column_bits((cells >= low) & (cells < high), 0)
                tie_place = write_chosen(words, base, candidates, tie_place, k, out, TILE)


@triton.jit
def _write_tucker_scores(
    row_scores, column_scores, row, column, candidates, cores, head, heads, scores, chosen_scores, mask, k,
    RANK: tl.constexpr, CORES: tl.constexpr,
):  # fmt: skip
    """Write the scores of cells, and those of their rows and columns."""
    for rank in tl.static_range(RANK):
        score = tl.load(row_scores + rank * candidates + row, mask, 0.0)
        tl.store(chosen_scores + rank * k, score, mask)
        score = tl.load(column_scores + rank * candidates + column, mask, 0.0)
        tl.store(chosen_scores + (RANK + rank) * k, score, mask)
    for core in tl.static_range(CORES):
        total = tl.zeros(mask.shape, tl.float32)
        for rank in tl.static_range(RANK):
            row_score = tl.load(row_scores + rank * candidates + row, mask, 0.0).to(tl.float32)
            for other in tl.static_range(RANK):
                column_score = tl.load(column_scores + other * candidates + column, mask, 0.0).to(tl.float32)
                weight = tl.load(cores + ((core * heads + head) * RANK + rank) * RANK + other)
                total += row_score * weight * column_score
        tl.store(scores + core, total, mask)


@Launcher
@triton.jit(do_not_specialize=["k"])
def _best_cells_kernel(
    candidate_keys, candidate_scores, weighted_rows, cores, cell_numbers, indices, scores, chosen_keys, chosen_scores,
    heads, keys, candidates, k,
    RANK: tl.constexpr, WEIGHTED: tl.constexpr, CORES: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The best k cells of the candidates' grid, their scores, and their rows' and columns' keys and scores."""
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    row_scores = candidate_scores + program * 2 * RANK * candidates
    columns = row_scores + RANK * candidates
    rows = weighted_rows + program * RANK * candidates if WEIGHTED else row_scores

    first = _tile(0, 0, rows, columns, candidates, RANK, WEIGHTED, MASKED)
    low, highest, live = _bounds(first, rows, columns, candidates, k, RANK, WEIGHTED, MASKED, TILES)
    count_low = _count_cells(low, first, live, rows, columns, candidates, RANK, WEIGHTED, MASKED, TILES)
    low, high, count_high = find_threshold(
        _count_cells, (first, live, rows, columns, candidates, RANK, WEIGHTED, MASKED, TILES),
        low, highest, count_low, k, k, 1,
    )  # fmt: skip
    cell_numbers += program * k
    _write_best(
        low, high, count_high, k, cell_numbers, first, live, rows, columns, candidates, RANK, WEIGHTED, MASKED, TILES
    )
    tl.debug_barrier()

    order = tl.arange(0, BLOCK_K)
    mask = order < k
    cell = tl.load(cell_numbers + order, mask, 0)
    row, column = cell // candidates, cell % candidates
    row_key = tl.load(candidate_keys + program * 2 * candidates + row, mask, 0)
    column_key = tl.load(candidate_keys + (program * 2 + 1) * candidates + column, mask, 0)
    tl.store(indices + program * k + order, row_key.to(tl.int64) * keys + column_key, mask)
    tl.store(chosen_keys + program * 2 * k + order, row_key, mask)
    tl.store(chosen_keys + (program * 2 + 1) * k + order, column_key, mask)
    scores += (program * k + order) * CORES
    if WEIGHTED:
        _write_tucker_scores(
            row_scores, columns, row, column, candidates, cores, head, heads, scores,
            chosen_scores + program * 2 * RANK * k + order, mask, k, RANK, CORES,
        )  # fmt: skip
    else:
        row_score = tl.load(row_scores + row, mask, 0.0).to(tl.float32)
        column_score = tl.load(columns + column, mask, 0.0).to(tl.float32)
        tl.store(scores, row_score + column_score, mask)


@dataclass(frozen=True)
class Cells:
    """The best cells of each token and head.

    Attributes:
        scores: (tokens, heads, k, cores), float32, in any order.
        indices: (tokens, heads, k), int64, `row * keys + column`.
        keys: (tokens, heads, 2, k), int32, rows and columns.
        chosen_scores: (tokens, heads, 2, rank, k), the rows' and columns' scores of Tucker cells; else empty.
    """

    scores: Tensor
    indices: Tensor
    keys: Tensor
    chosen_scores: Tensor


def best_cells(
    axis_scores: Tensor,
    keys: int,
    k: int,
    axis_k: int,
    cores: Tensor | None = None,
    u: Tensor | None = None,
    t: Tensor | None = None,
) -> Cells:
    """The best k cells of the grid of each axis' best `axis_k` keys.

    Args:
        axis_scores: (2, rank, tokens, heads, keys or more); last stride 1. Those from `keys` on are padding.
        keys: keys of each axis, at most `MAX_KEYS`.
        k: cells to choose, at most `MAX_CANDIDATES`.
        axis_k: candidates of each axis, at most `MAX_CANDIDATES`.
        cores: (cores, heads, rank, rank), float32, contiguous, for Tucker scores; None for sums, with rank 1.
        u, t: (heads, rank), float32, contiguous, with `cores`: weights of the ranks by which rows, columns are ranked.
    """
    _, rank, tokens, heads, _ = axis_scores.shape
    weighted = cores is not None
    num_cores = 1 if cores is None else cores.shape[0]
    new = axis_scores.new_empty
    cells = Cells(
        scores=new((tokens, heads, k, num_cores), dtype=torch.float32),
        indices=new((tokens, heads, k), dtype=torch.int64),
        keys=new((tokens, heads, 2, k), dtype=torch.int32),
        chosen_scores=new((tokens, heads, 2, rank, k) if weighted else 0),
    )
    if tokens == 0:
        return cells
    tiles = ceil_div(axis_k, TILE.value)
    candidates = best_keys(axis_scores, keys, axis_k, cores, u, t, in_order=tiles > 1)
    cell_numbers = new((tokens, heads, k), dtype=torch.int32)
    _best_cells_kernel(
        (tokens * heads,), *candidates, cores, cell_numbers, cells.indices, cells.scores, cells.keys,
        cells.chosen_scores, heads, keys, axis_k, k,
        RANK=rank, WEIGHTED=weighted, CORES=num_cores, TILES=tiles, MASKED=axis_k % TILE.value != 0,
        BLOCK_K=next_power_of_2(k), num_warps=1,
    )  # fmt: skip
    return cells
