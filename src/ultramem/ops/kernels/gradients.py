"""From the gradients of the best cells' scores to those of the axes' scores and of the cores.

A program handles one axis of a token and head. There are no atomics: results are the same from run to run, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.kernels.launching import Launcher, next_power_of_2


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
    token_stride, head_stride, core_gradients, heads, k, keys,
    RANK: tl.constexpr, WEIGHTED: tl.constexpr, CORES: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of the axes' scores, which are zero but for the chosen keys, and of this token's cores."""
    program, axis = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, head = program // heads, program % heads
    score_gradients += program * k * CORES
    chosen_scores += program * 2 * RANK * k
    chosen_keys += (program * 2 + axis) * k
    axis_gradients += axis * axis_stride + token * token_stride + head * head_stride
    # Zeros first, while the rest is computed: what is written over them is still in the cache.
    columns = tl.arange(0, BLOCK_KEYS)
    for rank in tl.static_range(RANK):
        for start in range(0, keys, BLOCK_KEYS):
            places = axis_gradients + rank * rank_stride + start + columns
            tl.store(places, tl.zeros([BLOCK_KEYS], axis_gradients.dtype.element_ty), start + columns < keys)
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
    else:
        cell_gradients = score_gradients
    tl.debug_barrier()
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


def best_cells_backward(
    score_gradients: Tensor, chosen_keys: Tensor, chosen_scores: Tensor, axis_gradients: Tensor, cores: Tensor | None
) -> Tensor | None:
    """Write the gradients of the axes' scores; return the cores', or None.

    Args:
        score_gradients: (tokens, heads, k, cores), float32.
        chosen_keys, chosen_scores: `keys` and `chosen_scores` of `Cells`.
        axis_gradients: (2, rank, tokens, heads, keys or more), written in its dtype; zero for keys not chosen.
        cores: as in `best_cells`; their gradient is float32.
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
            *axis_gradients.stride()[:4], core_gradients, heads, k, axis_gradients.shape[4],
            RANK=rank, WEIGHTED=weighted, CORES=num_cores, BLOCK_K=block_k, CHUNK=min(block_k, 32), BLOCK_KEYS=256,
            num_warps=1 if block_k <= 128 else 2,
        )  # fmt: skip
    return core_gradients.sum(0) if weighted else None
