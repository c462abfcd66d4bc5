"""Linear maps of few tokens by a Triton kernel: many programs, each with the weights of a few columns of the result.

Each warp of a program multiplies a part of the input's dimensions, so that their chains of products are short, and
loads for several steps are under way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.backend import KERNEL_DTYPES, can_run_kernels
from ultramem.ops.kernels.launching import Launcher, ceil_div, next_power_of_2
from ultramem.ops.kernels.overlapping import can_overlap, wait_for_others


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel for these arguments."""
    return can_run_kernels(x) and x.dtype in KERNEL_DTYPES and weight.dtype == x.dtype and weight.is_contiguous()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As the definition in `naive.py`, summed in float32."""
    if x.stride(1) != 1:
        x = x.contiguous()
    (tokens, dim), width = x.shape, weight.shape[0]
    result = x.new_empty(tokens, width)
    block_t = min(max(next_power_of_2(tokens), 16), 64)
    block_n = 16 if block_t <= 32 else 32  # more columns share what is read of the input
    if tokens and width:
        _linear_kernel(
            (ceil_div(width, block_n), ceil_div(tokens, block_t)), x, x.stride(0), weight, result, tokens, width,
            DIM=dim, PARTS=4, BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_D=64 // x.element_size(), WIDE=not x.is_cuda,
            STAGES=4, OVERLAPS=can_overlap(x.device), num_warps=4,
        )  # fmt: skip
    return result


@Launcher
@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x, x_stride, weight, result, tokens, width,
    DIM: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some columns of the result, for some tokens. `WIDE` is for the interpreter."""
    wait_for_others(OVERLAPS)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.arange(0, PARTS)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    of_tokens, of_columns = token < tokens, column < width
    first = x + token.to(tl.int64)[None, :, None] * x_stride
    first_weight = weight + column.to(tl.int64)[None, None, :] * DIM
    totals = tl.zeros([PARTS, BLOCK_T, BLOCK_N], tl.float32)
    for start in tl.range(0, DIM, PARTS * BLOCK_D, num_stages=STAGES):
        dims = start + part
        mask = dims < DIM
        inputs = tl.load(first + dims[:, None, :], mask[:, None, :] & of_tokens[None, :, None], 0.0)
        weights = tl.load(first_weight + dims[:, :, None], mask[:, :, None] & of_columns[None, None, :], 0.0)
        if WIDE:
            inputs, weights = inputs.to(tl.float32), weights.to(tl.float32)
        totals = tl.dot(inputs, weights, totals, input_precision="ieee")
    place = result + token.to(tl.int64)[:, None] * width + column[None, :]
    total = tl.sum(totals, axis=0).to(result.dtype.element_ty)
    tl.store(place, total, of_tokens[:, None] & of_columns[None, :])
