"""The scores of all keys for few tokens: many programs, each for a few keys, which norm the queries on the way."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.choose_reads.grid import Grid
from ultramem.ops.kernels.launching import Launcher, ceil_div, next_power_of_2
from ultramem.ops.kernels.overlapping import can_overlap, wait_for_others


@Launcher
@triton.jit(do_not_specialize=["tokens"])
def _scores_kernel(
    queries, token_stride, axis_step, rank_step, head_step, keys, scores, tokens, num_keys, rank, heads, eps,
    NORMED: tl.constexpr, WIDE: tl.constexpr, KEY_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Scores of some keys of one axis, rank and head, for some tokens. `WIDE` is for the interpreter."""
    wait_for_others(OVERLAPS)
    batch = tl.program_id(1)
    axis, head = batch // (rank * heads), batch % heads
    query = axis * axis_step + batch // heads % rank * rank_step + head * head_step
    token = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    of_tokens, of_keys = token < tokens, key < num_keys
    first = queries + token.to(tl.int64) * token_stride + query * KEY_DIM
    first_key = keys + (batch.to(tl.int64) * num_keys + key) * KEY_DIM
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for start in tl.range(0, KEY_DIM, BLOCK_D, num_stages=STAGES):  # all loads under way at once
        of_dims = start + dims < KEY_DIM
        q = tl.load(first[:, None] + (start + dims)[None, :], of_tokens[:, None] & of_dims[None, :], 0.0)
        k = tl.load(first_key[None, :] + (start + dims)[:, None], of_keys[None, :] & of_dims[:, None], 0.0)
        if WIDE:
            q, k = q.to(tl.float32), k.to(tl.float32)
        total = tl.dot(q, k, total, input_precision="ieee")
        if NORMED:
            squares += tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1)
    if NORMED:
        total *= (1.0 / tl.sqrt(squares / KEY_DIM + eps))[:, None]
    place = scores + (batch.to(tl.int64) * tokens + token)[:, None] * num_keys + key[None, :]
    tl.store(place, total.to(scores.dtype.element_ty), of_tokens[:, None] & of_keys[None, :])


def axis_scores(queries: Tensor, grid: Grid) -> Tensor:
    """Scores (2, rank, heads, tokens, keys of the grid, with padding) of queries (tokens, num_queries, key_dim)."""
    tokens, _, key_dim = queries.shape
    scores = queries.new_empty((*grid.keys.shape[:3], tokens, grid.keys.shape[3]))
    block_t = min(max(next_power_of_2(tokens), 16), 64)
    block_n, step_bytes = 32, 256 if block_t < 64 else 128  # of a key: three steps fit into the shared memory
    block_d = min(max(next_power_of_2(key_dim), 16), step_bytes // queries.element_size())
    _scores_kernel(
        (ceil_div(grid.keys.shape[3], block_n), 2 * grid.sizes.rank * grid.sizes.heads, ceil_div(tokens, block_t)),
        queries, queries.stride(0), *grid.query_steps, grid.keys, scores, tokens, grid.keys.shape[3],
        grid.sizes.rank, grid.sizes.heads, grid.norm_eps or 0.0,
        NORMED=grid.norm_eps is not None, WIDE=not queries.is_cuda, KEY_DIM=key_dim, BLOCK_T=block_t,
        BLOCK_N=block_n, BLOCK_D=block_d, STAGES=4, OVERLAPS=can_overlap(queries.device), num_warps=4,
    )  # fmt: skip
    return scores
