"""Triton kernels that find the best k cells of a grid of scores: candidates of each axis, then cells, then gradients.

Both kinds of retrieval use them: cells are bilinear in the scores of their row and column (Tucker), or sums (product
keys). A program serves one token and head. The k best of n numbers are found by a threshold that exactly k of them
reach: passes over registers, no sorting, nothing written but the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.kernels.launching import Launcher
from ultramem.ops.kernels.sizes import ceil_div, next_power_of_2

MAX_KEYS = 8192  # an index of 13 bits is packed with the score when candidates are put in order
MAX_CANDIDATES = 256
TILE = tl.constexpr(32)
# Scores are clamped, so that thresholds between any two of them, and products of them, are finite.
LIMIT = tl.constexpr(1e18)


@triton.jit
def _finite(x):
    """As float32 within the limits; NaN becomes the largest, as in `torch.topk`."""
    return tl.maximum(tl.minimum(x.to(tl.float32), LIMIT), -LIMIT)


@triton.jit
def _to_ordered(x):
    """The integer image of float32 numbers that has their order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_ordered(image):
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _above(x, STEP: tl.constexpr):
    """The next number, where `STEP` is the distance of neighbours' integer images."""
    return _from_ordered(_to_ordered(x) + STEP)


@triton.jit
def _distance(low, high):
    """Of the integer images; without a sign, it cannot overflow."""
    return _to_ordered(high).to(tl.uint32, bitcast=True) - _to_ordered(low).to(tl.uint32, bitcast=True)


@triton.jit
def _logarithm(x):
    """Of a positive number, to within 0.09, in units of 2**-23: its exponent and fraction as they stand."""
    return x.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def _next_probe(low, high, count_low, count_high, k, passes, STEP: tl.constexpr):
    """A threshold strictly between `low` and `high`, where the count that reaches it may be k.

    The logarithm of the count is nearly linear in the threshold: interpolation halves the passes of bisection. From
    the twelfth pass on it is bisection of the integer images, which ends for any input.
    """
    log_low, log_k = _logarithm(count_low.to(tl.float32)), _logarithm(k.to(tl.float32))
    log_high = _logarithm(tl.maximum(count_high.to(tl.float32), 0.5))
    share = (log_low - log_k) / tl.maximum(log_low - log_high, 1.0)
    image_low, image_high = _to_ordered(low), _to_ordered(high)
    if passes < 12:
        image = _to_ordered(low + (high - low) * tl.minimum(tl.maximum(share, 0.02), 0.98))
    else:
        image = image_low + (_distance(low, high) // 2).to(tl.int32)
    if STEP > 1:
        image = image // STEP * STEP
    return _from_ordered(tl.minimum(tl.maximum(image, image_low + STEP), image_high - STEP))


@triton.jit
def _narrow(low, high, count_low, count_high, probe, count, k):
    """The bounds, and the counts that reach them, once `count` numbers are known to reach `probe`."""
    enough = count >= k
    low, count_low = tl.where(enough, probe, low), tl.where(enough, count, count_low)
    high, count_high = tl.where(enough, high, probe), tl.where(enough, count_high, count)
    return low, high, count_low, count_high


@triton.jit
def _load_axis(
    scores, rank_stride, directions, start, keys, RANK: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores along one axis, summed over ranks with the direction's weights; -inf beyond the last key.

    They are laid out so that a thread holds whole columns.
    """
    offsets = start + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = offsets < keys if MASKED else None
    if WEIGHTED:
        total = tl.load(directions) * tl.load(scores + offsets, mask).to(tl.float32)
        for rank in tl.static_range(1, RANK):
            weight = tl.load(directions + rank)
            total += weight * tl.load(scores + rank * rank_stride + offsets, mask).to(tl.float32)
    else:
        total = tl.load(scores + offsets, mask).to(tl.float32)
    total = _finite(total)
    if MASKED:
        total = tl.where(mask, total, -float("inf"))
    return total


@triton.jit
def _count(main, tail, probe, TAIL: tl.constexpr):
    counts = tl.sum((main >= probe).to(tl.int32), axis=0)
    if TAIL > 0:
        counts += tl.sum((tail >= probe).to(tl.int32), axis=0)
    return tl.sum(counts)


@triton.jit
def _lowest(x):
    """The lowest number that is not -inf."""
    return tl.min(tl.min(tl.where(x == -float("inf"), LIMIT, x), axis=0))


@triton.jit
def _column_bits(chosen, FIRST: tl.constexpr):
    """For each column a word in which bit `FIRST + row` says whether the cell is chosen."""
    rows = FIRST + tl.arange(0, chosen.shape[0])
    return tl.sum(tl.where(chosen, (1 << rows)[:, None], 0), axis=0)


@triton.jit
def _count_bits(words):
    words = words.to(tl.uint32, bitcast=True)
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _write_chosen(words, base, row_stride, first, last, out, ROWS: tl.constexpr):
    """Write the numbers of the cells marked in `words` to places from `first` on, but none to `last` or beyond.

    A word holds `32 // ROWS` columns of `ROWS` cells; the number of a cell is `base + row * row_stride + column`. Only
    the words' counts are summed across threads. Returns the next place.
    """
    entries = tl.arange(0, words.shape[0])
    counts = _count_bits(words)
    places = first + tl.cumsum(counts) - counts
    while tl.max((words != 0).to(tl.int32)) == 1:
        lowest = (words & -words).to(tl.float32)
        bit = ((lowest.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        number = base + bit % ROWS * row_stride + entries * (32 // ROWS) + bit // ROWS
        tl.store(out + places, number, mask=(words != 0) & (places < last))
        places += 1
        words = words & (words - 1)
    return first + tl.sum(counts)


@triton.jit
def _axis_words(main, tail, MAIN_ROWS: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr):
    """The chosen keys of an axis as words of four columns of at most eight cells."""
    bits = _column_bits(main, 0)
    if TAIL > 0:
        bits += _column_bits(tail, MAIN_ROWS)
    shifts = tl.arange(0, 4) * 8
    return tl.sum(tl.reshape(bits, [COLUMNS // 4, 4]) << shifts[None, :], axis=1)


@Launcher
@triton.jit(do_not_specialize=["k"])
def _axis_candidates_kernel(
    scores, axis_stride, rank_stride, token_stride, head_stride, u, t, cores, candidates, candidate_scores,
    weighted_rows, heads, keys, k,
    RANK: tl.constexpr, WEIGHTED: tl.constexpr, CORES: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr, GROUPS: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    SORT: tl.constexpr,
):  # fmt: skip
    """The best k keys of one axis, in descending order (of 19 bits of the score) if `SORT`, with their scores."""
    program, axis = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, head = program // heads, program % heads
    scores += axis * axis_stride + token * token_stride + head * head_stride
    directions = u
    if WEIGHTED:
        directions = (u if axis == 0 else t) + head * RANK
    main = _load_axis(
        scores, rank_stride, directions, 0, keys, RANK, WEIGHTED, MAIN // COLUMNS, COLUMNS, MASKED
    )  # fmt: skip
    best_of_columns = tl.max(main, axis=0)
    highest = tl.max(best_of_columns)
    tail = main
    if TAIL > 0:
        tail = _load_axis(
            scores, rank_stride, directions, MAIN, keys, RANK, WEIGHTED, TAIL // COLUMNS, COLUMNS, True
        )  # fmt: skip
        highest = tl.maximum(highest, tl.max(tl.max(tail, axis=0)))

    if GROUPS > 0:  # at least k numbers reach the lowest of k or more groups' maxima
        low = tl.min(tl.max(tl.reshape(best_of_columns, [GROUPS, COLUMNS // GROUPS], can_reorder=True), axis=1))
    else:
        low = _lowest(main)
        if TAIL > 0:
            low = tl.minimum(low, _lowest(tail))
    high = _above(highest, STEP)
    count_low = _count(main, tail, low, TAIL)
    count_high = 0
    passes = 0
    while (count_low != k) & (_distance(low, high) > STEP):
        probe = _next_probe(low, high, count_low, count_high, k, passes, STEP)
        count = _count(main, tail, probe, TAIL)
        low, high, count_low, count_high = _narrow(low, high, count_low, count_high, probe, count, k)
        passes += 1

    candidates += (program * 2 + axis) * k
    exact = count_low == k
    reach = tl.where(exact, low, high)
    words = _axis_words(main >= reach, tail >= reach, MAIN // COLUMNS, TAIL, COLUMNS)
    place = _write_chosen(words, 0, COLUMNS, 0, k, candidates, 8)
    if place < k:
        tied = (main >= low) & (main < high)
        words = _axis_words(tied, (tail >= low) & (tail < high), MAIN // COLUMNS, TAIL, COLUMNS)
        _write_chosen(words, 0, COLUMNS, place, k, candidates, 8)
    tl.debug_barrier()

    order = tl.arange(0, BLOCK_K)
    mask = order < k
    chosen = tl.load(candidates + order, mask, 0)
    if SORT:
        total = tl.zeros([BLOCK_K], tl.float32)
        for rank in tl.static_range(RANK):
            weight = tl.load(directions + rank) if WEIGHTED else 1.0
            total += weight * tl.load(scores + rank * rank_stride + chosen, mask, 0.0).to(tl.float32)
        packed = (_to_ordered(_finite(total)) & -8192) | chosen
        chosen = tl.sort(tl.where(mask, packed, -2147483648), descending=True) & 8191
        tl.store(candidates + order, chosen, mask)
    candidate_scores += (program * 2 + axis) * RANK * k
    for rank in tl.static_range(RANK):
        score = tl.load(scores + rank * rank_stride + chosen, mask, 0.0)
        tl.store(candidate_scores + rank * k + order, score, mask)
    if WEIGHTED:  # known when it is compiled, the axis is not
        if axis == 0:
            _weigh_rows(
                scores + chosen, rank_stride, cores, head, heads, weighted_rows + program * RANK * k + order, mask, k,
                RANK, CORES,
            )  # fmt: skip


@triton.jit
def _weigh_rows(row_scores, rank_stride, cores, head, heads, out, mask, k, RANK: tl.constexpr, CORES: tl.constexpr):
    """Rows times the summed cores: a cell's score is the product of that with its column."""
    for other in tl.static_range(RANK):
        total = tl.zeros(mask.shape, tl.float32)
        for rank in tl.static_range(RANK):
            weight = 0.0
            for core in tl.static_range(CORES):
                weight += tl.load(cores + ((core * heads + head) * RANK + rank) * RANK + other)
            total += tl.load(row_scores + rank * rank_stride, mask, 0.0).to(tl.float32) * weight
        tl.store(out + other * k, total, mask)


@triton.jit
def _cells(
    rows, columns, row_tile, column_tile, candidates, RANK: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr
):
    """Scores of one tile of the grid; -inf beyond its edge.

    To the bit the same wherever it is inlined, so that as many cells are written as were counted: the compiler is left
    no choice between fused and separate operations.
    """
    i, j = tl.arange(0, TILE) + row_tile * TILE, tl.arange(0, TILE) + column_tile * TILE
    row_mask = i < candidates if MASKED else None
    column_mask = j < candidates if MASKED else None
    cells = _finite(tl.load(rows + i, row_mask))[:, None]
    column = _finite(tl.load(columns + j, column_mask))[None, :]
    cells = cells * column if WEIGHTED else cells + column
    for rank in tl.static_range(1, RANK):
        row = _finite(tl.load(rows + rank * candidates + i, row_mask))
        column = _finite(tl.load(columns + rank * candidates + j, column_mask))
        row, column = tl.broadcast(row[:, None], column[None, :])
        cells = tl.fma(row, column, cells)
    if MASKED:
        cells = tl.where((i < candidates)[:, None] & (j < candidates)[None, :], cells, -float("inf"))
    return cells


@triton.jit
def _count_cells(
    first, rows, columns, live, probe, candidates, RANK: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """How many cells of the live tiles reach the probe."""
    counts = tl.sum((first >= probe).to(tl.int32), axis=0)
    for tile in range(1, TILES * TILES):
        if (live >> tile) & 1 == 1:
            cells = _cells(rows, columns, tile // TILES, tile % TILES, candidates, RANK, WEIGHTED, MASKED)
            counts += tl.sum((cells >= probe).to(tl.int32), axis=0)
    return tl.sum(counts)


@Launcher
@triton.jit(do_not_specialize=["k"])
def _best_cells_kernel(
    candidates_of_axes, candidate_scores, weighted_rows, cores, cell_numbers, indices, scores, chosen_keys,
    chosen_scores, heads, keys, candidates, k,
    RANK: tl.constexpr, WEIGHTED: tl.constexpr, CORES: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The best k cells of the candidates' grid, their scores, and their rows' and columns' keys and scores."""
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    row_scores = candidate_scores + program * 2 * RANK * candidates
    columns = row_scores + RANK * candidates
    rows = weighted_rows + program * RANK * candidates if WEIGHTED else row_scores

    first = _cells(rows, columns, 0, 0, candidates, RANK, WEIGHTED, MASKED)
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
        low = tl.min(tl.min(first, axis=0))
        bound = _above(highest, 1)
        count_low = TILE * TILE
        count_bound = 0
        passes = 0
        while (count_low > k + k // 8) & (_distance(low, bound) > 1):
            probe = _next_probe(low, bound, count_low, count_bound, k, passes, 1)
            count = tl.sum(tl.sum((first >= probe).to(tl.int32), axis=0))
            low, bound, count_low, count_bound = _narrow(low, bound, count_low, count_bound, probe, count, k)
            passes += 1
        for tile in range(1, TILES * TILES):
            cells = _cells(rows, columns, tile // TILES, tile % TILES, candidates, RANK, WEIGHTED, MASKED)
            best = tl.max(tl.max(cells, axis=0))
            highest = tl.maximum(highest, best)
            live |= (best >= low).to(tl.int64) << tile

    high = _above(highest, 1)
    count_low = _count_cells(first, rows, columns, live, low, candidates, RANK, WEIGHTED, MASKED, TILES)
    count_high = 0
    passes = 0
    while (count_low != k) & (_distance(low, high) > 1):
        probe = _next_probe(low, high, count_low, count_high, k, passes, 1)
        count = _count_cells(first, rows, columns, live, probe, candidates, RANK, WEIGHTED, MASKED, TILES)
        low, high, count_low, count_high = _narrow(low, high, count_low, count_high, probe, count, k)
        passes += 1
    exact = count_low == k
    high, count_high = tl.where(exact, low, high), tl.where(exact, k, count_high)

    cell_numbers += program * k
    place = 0
    tie_place = count_high
    for tile in range(TILES * TILES):
        if (live >> tile) & 1 == 1:
            cells = first
            if TILES > 1:
                cells = _cells(rows, columns, tile // TILES, tile % TILES, candidates, RANK, WEIGHTED, MASKED)
            base = tile // TILES * TILE * candidates + tile % TILES * TILE
            words = _column_bits(cells >= high, 0)
            place = _write_chosen(words, base, candidates, place, k, cell_numbers, TILE)
            if tie_place < k:
                words = _column_bits((cells >= low) & (cells < high), 0)
                tie_place = _write_chosen(words, base, candidates, tie_place, k, cell_numbers, TILE)
    tl.debug_barrier()

    order = tl.arange(0, BLOCK_K)
    mask = order < k
    cell = tl.load(cell_numbers + order, mask, 0)
    row, column = cell // candidates, cell % candidates
    row_keys = tl.load(candidates_of_axes + program * 2 * candidates + row, mask, 0)
    column_keys = tl.load(candidates_of_axes + (program * 2 + 1) * candidates + column, mask, 0)
    tl.store(indices + program * k + order, row_keys.to(tl.int64) * keys + column_keys, mask)
    tl.store(chosen_keys + program * 2 * k + order, row_keys, mask)
    tl.store(chosen_keys + (program * 2 + 1) * k + order, column_keys, mask)
    if WEIGHTED:
        chosen_scores += program * 2 * RANK * k
        for rank in tl.static_range(RANK):
            tl.store(chosen_scores + rank * k + order, tl.load(row_scores + rank * candidates + row, mask, 0.0), mask)
            score = tl.load(columns + rank * candidates + column, mask, 0.0)
            tl.store(chosen_scores + (RANK + rank) * k + order, score, mask)
        for core in tl.static_range(CORES):
            total = tl.zeros([BLOCK_K], tl.float32)
            for rank in tl.static_range(RANK):
                row_score = tl.load(row_scores + rank * candidates + row, mask, 0.0).to(tl.float32)
                for other in tl.static_range(RANK):
                    column_score = tl.load(columns + other * candidates + column, mask, 0.0).to(tl.float32)
                    weight = tl.load(cores + ((core * heads + head) * RANK + rank) * RANK + other)
                    total += row_score * weight * column_score
            tl.store(scores + (program * k + order) * CORES + core, total, mask)
    else:
        row_score = tl.load(row_scores + row, mask, 0.0).to(tl.float32)
        column_score = tl.load(columns + column, mask, 0.0).to(tl.float32)
        tl.store(scores + program * k + order, row_score + column_score, mask)


@triton.jit
def _cell_gradient(
    score_gradients, opposite_scores, cores, order, mask, axis, head, heads, k, rank: tl.constexpr,
    RANK: tl.constexpr, CORES: tl.constexpr,
):  # fmt: skip
    """Gradient that the chosen cells give to their rows' scores (axis 0) or columns' (axis 1) in one rank."""
    total = tl.zeros(order.shape, tl.float32)
    for core in tl.static_range(CORES):
        gradient = tl.load(score_gradients + order * CORES + core, mask, 0.0)
        for other in tl.static_range(RANK):
            score = tl.load(opposite_scores + other * k + order, mask, 0.0).to(tl.float32)
            place = tl.where(axis == 0, rank * RANK + other, other * RANK + rank)
            total += gradient * score * tl.load(cores + (core * heads + head) * RANK * RANK + place)
    return total


@Launcher
@triton.jit
def _gradient_kernel(
    score_gradients, chosen_keys, chosen_scores, cores, cell_gradients, axis_gradients, axis_stride, rank_stride,
    token_stride, head_stride, core_gradients, heads, k,
    RANK: tl.constexpr, WEIGHTED: tl.constexpr, CORES: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of the axes' scores, which are zero but for the chosen keys, and of this token's cores."""
    program, axis = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, head = program // heads, program % heads
    score_gradients += program * k * CORES
    chosen_scores += program * 2 * RANK * k
    chosen_keys += (program * 2 + axis) * k
    axis_gradients += axis * axis_stride + token * token_stride + head * head_stride
    order = tl.arange(0, BLOCK_K)
    mask = order < k
    key = tl.load(chosen_keys + order, mask, -1)
    if WEIGHTED:
        cell_gradients += (program * 2 + axis) * RANK * k
        opposite = chosen_scores + (1 - axis) * RANK * k
        for rank in tl.static_range(RANK):
            gradient = _cell_gradient(
                score_gradients, opposite, cores, order, mask, axis, head, heads, k, rank, RANK, CORES
            )
            tl.store(cell_gradients + rank * k + order, gradient, mask)
        tl.debug_barrier()
    else:
        cell_gradients = score_gradients
    for rank in tl.static_range(RANK):
        # Cells that share a key are summed by comparing all pairs: no atomics. Each writes the same sum.
        total = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, BLOCK_K, CHUNK):
            others = start + tl.arange(0, CHUNK)
            same = tl.load(chosen_keys + others, others < k, -2)[:, None] == key[None, :]
            given = tl.load(cell_gradients + rank * k + others, others < k, 0.0)
            total += tl.sum(tl.where(same, given[:, None], 0.0), axis=0)
        tl.store(axis_gradients + rank * rank_stride + key, total, mask)
    if WEIGHTED:  # known when it is compiled, the axis is not
        if axis == 0:
            for core in tl.static_range(CORES):
                gradient = tl.load(score_gradients + order * CORES + core, mask, 0.0)
                for rank in tl.static_range(RANK):
                    row_score = tl.load(chosen_scores + rank * k + order, mask, 0.0).to(tl.float32)
                    for other in tl.static_range(RANK):
                        score = tl.load(chosen_scores + (RANK + other) * k + order, mask, 0.0).to(tl.float32)
                        place = ((token * CORES + core) * heads + head) * RANK * RANK + rank * RANK + other
                        tl.store(core_gradients + place, tl.sum(gradient * row_score * score))


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
        u: (heads, rank), float32, contiguous, with `cores`: weights of the ranks by which rows are ranked.
        t: (heads, rank), float32, contiguous, with `cores`: the same for columns.
    """
    _, rank, tokens, heads, _ = axis_scores.shape
    weighted = cores is not None
    num_cores = cores.shape[0] if cores is not None else 1
    new = axis_scores.new_empty
    cells = Cells(
        scores=new((tokens, heads, k, num_cores), dtype=torch.float32),
        indices=new((tokens, heads, k), dtype=torch.int64),
        keys=new((tokens, heads, 2, k), dtype=torch.int32),
        chosen_scores=new((tokens, heads, 2, rank, k) if weighted else 0),
    )
    if tokens == 0:
        return cells
    candidates = new((tokens, heads, 2, axis_k), dtype=torch.int32)
    candidate_scores = new((tokens, heads, 2, rank, axis_k))
    weighted_rows = new((tokens, heads, rank, axis_k) if weighted else 0, dtype=torch.float32)
    cell_numbers = new((tokens, heads, k), dtype=torch.int32)
    tiles = ceil_div(axis_k, TILE.value)
    sizes = {"RANK": rank, "WEIGHTED": weighted, "CORES": num_cores}
    _axis_candidates_kernel(
        (tokens * heads, 2), axis_scores, *axis_scores.stride()[:4], u, t, cores, candidates, candidate_scores,
        weighted_rows, heads, keys, axis_k,
        **sizes, **_axis_blocks(keys, axis_k), BLOCK_K=next_power_of_2(axis_k),
        STEP=1 if weighted else _image_distance(axis_scores.dtype), SORT=tiles > 1,
    )  # fmt: skip
    _best_cells_kernel(
        (tokens * heads,), candidates, candidate_scores, weighted_rows, cores, cell_numbers, cells.indices,
        cells.scores, cells.keys, cells.chosen_scores, heads, keys, axis_k, k,
        **sizes, TILES=tiles, MASKED=axis_k % TILE.value != 0, BLOCK_K=next_power_of_2(k), num_warps=1,
    )  # fmt: skip
    return cells


def best_cells_backward(
    score_gradients: Tensor,
    chosen_keys: Tensor,
    chosen_scores: Tensor,
    axis_gradients: Tensor,
    cores: Tensor | None = None,
) -> Tensor | None:
    """Write the gradients of the axes' scores; those of keys that were not chosen are left alone.

    Args:
        score_gradients: (tokens, heads, k, cores), float32.
        chosen_keys: the `keys` of `Cells`.
        chosen_scores: of `Cells`.
        axis_gradients: (2, rank, tokens, heads, keys or more), written in its dtype.
        cores: as in `best_cells`.

    Returns:
        Gradient of the cores, float32, or None without cores.
    """
    tokens, heads, k, num_cores = score_gradients.shape
    rank = axis_gradients.shape[1]
    weighted = cores is not None
    core_gradients = score_gradients.new_empty((tokens, *cores.shape) if cores is not None else 0)
    if tokens:
        block_k = next_power_of_2(k)
        cell_gradients = score_gradients.new_empty((tokens, heads, 2, rank, k) if weighted else 0)
        _gradient_kernel(
            (tokens * heads, 2), score_gradients, chosen_keys, chosen_scores, cores, cell_gradients, axis_gradients,
            *axis_gradients.stride()[:4], core_gradients, heads, k,
            RANK=rank, WEIGHTED=weighted, CORES=num_cores, BLOCK_K=block_k, CHUNK=min(block_k, 32),
            num_warps=1 if block_k <= 128 else 2,
        )  # fmt: skip
    return core_gradients.sum(0) if weighted else None


@lru_cache
def _axis_blocks(keys: int, k: int) -> dict[str, int | bool]:
    """How an axis is laid out: two powers of two, since half of a single one would often be padding."""
    main = max(32, 1 << (keys.bit_length() - 1))
    num_warps = next_power_of_2(ceil_div(keys, 2048))
    columns = min(main, 256 * num_warps)
    rest = max(keys - main, 0)
    # For a bound that k keys reach, columns are divided into k groups or more, each of which has a key.
    groups = max(32, next_power_of_2(k))
    return {
        "MAIN": main,
        "TAIL": columns * next_power_of_2(ceil_div(rest, columns)) if rest else 0,
        "COLUMNS": columns,
        "MASKED": keys < main,
        "GROUPS": groups if groups <= columns and main <= keys else 0,
        "num_warps": num_warps,
    }


def _image_distance(dtype: torch.dtype) -> int:
    """Distance of the integer images in float32 of neighbouring numbers."""
    return 1 << 16 if dtype == torch.bfloat16 else 1


def pad_keys(keys: Tensor) -> Tensor:
    """Keys (..., keys, key_dim) with zeros up to a multiple of 64, which fast matrix products need."""
    count = keys.shape[-2]
    return F.pad(keys, (0, 0, 0, ceil_div(count, 64) * 64 - count))


def axis_scores(queries: Tensor, padded: Tensor) -> Tensor:
    """Scores (batch, tokens, heads, padded keys) by one batched product.

    Args:
        queries: (batch, tokens, key_dim).
        padded: keys, (batch, heads, padded keys, key_dim), same dtype.
    """
    return torch.bmm(queries, padded.flatten(1, 2).transpose(1, 2)).unflatten(-1, padded.shape[1:3])


def axis_scores_backward(
    gradients: Tensor, queries: Tensor, padded: Tensor, query_gradients: Tensor, key_gradients: Tensor
) -> None:
    """Write the gradients of the queries and of the padded keys; shapes as in `axis_scores`."""
    flat = gradients.flatten(2)
    torch.bmm(flat, padded.flatten(1, 2), out=query_gradients)
    torch.bmm(flat.transpose(1, 2), queries, out=key_gradients.flatten(1, 2))
