"""The best k keys of each axis, the candidates whose grid is searched for the best cells.

A program serves one axis of a token and head; a warp or a few hold all scores of the axis in registers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.kernels.launching import Launcher, ceil_div, next_power_of_2
from ultramem.ops.kernels.selection import LIMIT, column_bits, find_threshold, finite, to_ordered, write_chosen

MAX_KEYS = 8192  # an index of 13 bits is packed with the score when candidates are put in order


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
    total = finite(total)
    if MASKED:
        total = tl.where(mask, total, -float("inf"))
    return total


@triton.jit
def _count_keys(probe, main, tail, TAIL: tl.constexpr):
    counts = tl.sum((main >= probe).to(tl.int32), axis=0)
    if TAIL > 0:
        counts += tl.sum((tail >= probe).to(tl.int32), axis=0)
    return tl.sum(counts)


@triton.jit
def _lowest(x):
    """The lowest number that is not -inf."""
    return tl.min(tl.min(tl.where(x == -float("inf"), LIMIT, x), axis=0))


@triton.jit
def _bounds(main, tail, TAIL: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr):
    """A number that at least k keys reach, and the highest."""
    best_of_columns = tl.max(main, axis=0)
    highest = tl.max(best_of_columns)
    if TAIL > 0:
        highest = tl.maximum(highest, tl.max(tl.max(tail, axis=0)))
    if GROUPS > 0:  # at least k numbers reach the lowest of k or more groups' maxima
        low = tl.min(tl.max(tl.reshape(best_of_columns, [GROUPS, COLUMNS // GROUPS], can_reorder=True), axis=1))
    else:
        low = _lowest(main)
        if TAIL > 0:
            low = tl.minimum(low, _lowest(tail))
    return low, highest


@triton.jit
def _axis_words(main, tail, MAIN_ROWS: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr):
    """The chosen keys of an axis as words of four columns of at most eight cells."""
    bits = column_bits(main, 0)
    if TAIL > 0:
        bits += column_bits(tail, MAIN_ROWS)
    shifts = tl.arange(0, 4) * 8
    return tl.sum(tl.reshape(bits, [COLUMNS // 4, 4]) << shifts[None, :], axis=1)


@triton.jit
def _write_best(
    low, high, k, out, main, tail, MAIN_ROWS: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write the numbers of the keys that reach `high`, and of some between, k in all."""
    words = _axis_words(main >= high, tail >= high, MAIN_ROWS, TAIL, COLUMNS)
    place = write_chosen(words, 0, COLUMNS, 0, k, out, 8)
    if place < k:
        tied = (main >= low) & (main < high)
        words = _axis_words(tied, (tail >= low) & (tail < high), MAIN_ROWS, TAIL, COLUMNS)
        write_chosen(words, 0, COLUMNS, place, k, out, 8)


@triton.jit
def _in_order(
    chosen, scores, rank_stride, directions, mask, RANK: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Chosen keys by descending score, of which 19 bits count."""
    total = tl.zeros([BLOCK_K], tl.float32)
    for rank in tl.static_range(RANK):
        weight = tl.load(directions + rank) if WEIGHTED else 1.0
        total += weight * tl.load(scores + rank * rank_stride + chosen, mask, 0.0).to(tl.float32)
    packed = (to_ordered(finite(total)) & -8192) | chosen
    return tl.sort(tl.where(mask, packed, -2147483648), descending=True) & 8191


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
    tail = main
    if TAIL > 0:
        tail = _load_axis(
            scores, rank_stride, directions, MAIN, keys, RANK, WEIGHTED, TAIL // COLUMNS, COLUMNS, True
        )  # fmt: skip
    low, highest = _bounds(main, tail, TAIL, COLUMNS, GROUPS)
    count_low = _count_keys(low, main, tail, TAIL)
    low, high, _ = find_threshold(_count_keys, (main, tail, TAIL), low, highest, count_low, k, k, STEP)
    candidates += (program * 2 + axis) * k
    _write_best(low, high, k, candidates, main, tail, MAIN // COLUMNS, TAIL, COLUMNS)
    tl.debug_barrier()

    order = tl.arange(0, BLOCK_K)
    mask = order < k
    chosen = tl.load(candidates + order, mask, 0)
    if SORT:
        chosen = _in_order(chosen, scores, rank_stride, directions, mask, RANK, WEIGHTED, BLOCK_K)
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


class Candidates(NamedTuple):
    """The best keys of each token's and head's axes.

    Attributes:
        keys: (tokens, heads, 2, k), int32.
        scores: (tokens, heads, 2, rank, k).
        weighted_rows: (tokens, heads, rank, k), float32, the rows' scores times the summed cores; without cores empty.
    """

    keys: Tensor
    scores: Tensor
    weighted_rows: Tensor


def best_keys(
    axis_scores: Tensor, keys: int, k: int, cores: Tensor | None, u: Tensor | None, t: Tensor | None, in_order: bool
) -> Candidates:
    """The best k keys of each axis; arguments as in `best_cells`, but for `in_order`: by descending score."""
    _, rank, tokens, heads, _ = axis_scores.shape
    weighted = cores is not None
    # Distance of the integer images in float32 of neighbouring numbers.
    step = 1 << 16 if axis_scores.dtype == torch.bfloat16 and not weighted else 1
    new = axis_scores.new_empty
    candidates = Candidates(
        new((tokens, heads, 2, k), dtype=torch.int32),
        new((tokens, heads, 2, rank, k)),
        new((tokens, heads, rank, k) if weighted else 0, dtype=torch.float32),
    )
    _axis_candidates_kernel(
        (tokens * heads, 2), axis_scores, *axis_scores.stride()[:4], u, t, cores, *candidates, heads, keys, k,
        RANK=rank, WEIGHTED=weighted, CORES=1 if cores is None else cores.shape[0], **_layout(keys, k),
        BLOCK_K=next_power_of_2(k), STEP=step, SORT=in_order,
    )  # fmt: skip
    return candidates


@lru_cache
def _layout(keys: int, k: int) -> dict[str, int | bool]:
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
