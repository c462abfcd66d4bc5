"""Weighted sums of table rows with Triton kernels: rows are read once in either direction and never written out."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.backend import autocast_dtype, can_run_kernels
from ultramem.ops.kernels.launching import Launcher
from ultramem.ops.kernels.operators import FusedOperator
from ultramem.ops.kernels.sizes import next_power_of_2
from ultramem.ops.weighted_lookup.shared_table import Products, SharedTable, TableState

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Widest rows that one program holds several of in registers.
_MAX_WIDTH = 4096


def supports(scores: Tensor, rows: Tensor, table: SharedTable, pre_input: Tensor | None = None, **options: Any) -> bool:
    """Whether there are kernels for these arguments."""
    tables = [table.values] if table.pre_values is None else [table.values, table.pre_values]
    return (
        can_run_kernels(table.values)
        and all(part.dtype in _DTYPES and part.shape[1] <= _MAX_WIDTH for part in tables)
        and autocast_dtype(table.values) in _DTYPES
    )


def weighted_lookup(
    scores: Tensor,
    rows: Tensor,
    table: SharedTable,
    pre_input: Tensor | None = None,
    *,
    pre_activation: str | None = None,
    blocks: Tensor | None = None,
    num_blocks: int = 1,
) -> Tensor:
    """As the definition in `naive.py`, computed and returned in autocast's dtype where that is on."""
    dtype = autocast_dtype(table.values)
    result: Tensor = _weighted_lookup(
        scores.float().contiguous(),
        rows.contiguous(),
        None if blocks is None else blocks.contiguous(),
        table.values.detach(),
        None if table.pre_values is None else table.pre_values.detach(),
        None if pre_input is None else pre_input.to(dtype).contiguous(),
        table.link if torch.is_grad_enabled() else table.link.detach(),
        table.number,
        pre_activation or "",
        1 if blocks is None else num_blocks,
        dtype,
    )
    return result


def _compute_tables(
    number: Tensor, values: Tensor, pre_values: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    state = TableState.find(number)
    if state is not None:
        return state.compute_tables(values, pre_values, dtype)
    return values.to(dtype), None if pre_values is None else pre_values.to(dtype)


@triton.jit
def _activation(x, NAME: tl.constexpr):
    if NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "silu":
        y = x * tl.sigmoid(x)
    else:
        y = x
    return y


@triton.jit
def _activation_gradient(x, NAME: tl.constexpr):
    if NAME == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "silu":
        sigmoid = tl.sigmoid(x)
        y = sigmoid * (1.0 + x * (1.0 - sigmoid))
    else:
        y = tl.full(x.shape, 1.0, tl.float32)
    return y


@triton.jit
def _load_rows(table, stride, rows, columns, mask, WIDTH: tl.constexpr):
    places = table + rows[:, None] * stride + columns[None, :]
    return tl.load(places, mask[:, None] & (columns < WIDTH)[None, :], 0.0).to(tl.float32)


@Launcher
@triton.jit
def _lookup_kernel(
    scores, rows, blocks, values, value_stride, pre_values, pre_stride, pre_input, output,
    HAS_BLOCKS: tl.constexpr, ACTIVATION: tl.constexpr, K: tl.constexpr, CORES: tl.constexpr,
    VALUE_DIM: tl.constexpr, PRE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One token's sum, of one virtual block if these are kept apart."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns, pre_columns = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_P)
    if PRE_DIM > 0:
        x = tl.load(pre_input + token * PRE_DIM + pre_columns, pre_columns < PRE_DIM, 0.0).to(tl.float32)
    total = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for start in range(0, K, BLOCK_K):
        reads = start + tl.arange(0, BLOCK_K)
        mask = reads < K
        row = tl.load(rows + token * K + reads, mask, 0)
        if HAS_BLOCKS:
            mask = mask & (tl.load(blocks + token * K + reads, mask, -1) == block)
        value = _load_rows(values, value_stride, row, columns, mask, VALUE_DIM)
        if PRE_DIM > 0:
            pre_value = _load_rows(pre_values, pre_stride, row, pre_columns, mask, PRE_DIM)
            factor = _activation(tl.sum(pre_value * x[None, :], axis=1), ACTIVATION)
        else:
            factor = tl.full([BLOCK_K], 1.0, tl.float32)
        weight = tl.load(scores + (token * K + reads) * CORES, mask, 0.0) * factor
        weights = tl.broadcast_to(weight[:, None], [BLOCK_K, BLOCK_V])
        for core in tl.static_range(1, CORES):
            weight = tl.load(scores + (token * K + reads) * CORES + core, mask, 0.0) * factor
            weights = tl.where((columns >= core * (VALUE_DIM // CORES))[None, :], weight[:, None], weights)
        total += weights * value
    place = output + (token * tl.num_programs(1) + block) * VALUE_DIM + columns
    tl.store(place, tl.sum(total, axis=0), columns < VALUE_DIM)


@Launcher
@triton.jit
def _lookup_backward_kernel(
    gradients, scores, rows, blocks, values, value_stride, pre_values, pre_stride, pre_input,
    score_gradients, input_gradients, weights, pre_weights, gradient_width,
    HAS_BLOCKS: tl.constexpr, ACTIVATION: tl.constexpr, K: tl.constexpr, CORES: tl.constexpr,
    VALUE_DIM: tl.constexpr, PRE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradients of one token's scores and pre-value input, and what its reads weigh in the table's gradient."""
    token = tl.program_id(0).to(tl.int64)
    columns, pre_columns = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_P)
    gradients += token * gradient_width
    if PRE_DIM > 0:
        x = tl.load(pre_input + token * PRE_DIM + pre_columns, pre_columns < PRE_DIM, 0.0).to(tl.float32)
        input_gradient = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    if not HAS_BLOCKS:
        whole_gradient = tl.load(gradients + columns, columns < VALUE_DIM, 0.0).to(tl.float32)
    for start in range(0, K, BLOCK_K):
        reads = start + tl.arange(0, BLOCK_K)
        mask = reads < K
        row = tl.load(rows + token * K + reads, mask, 0)
        value = _load_rows(values, value_stride, row, columns, mask, VALUE_DIM)
        if PRE_DIM > 0:
            pre_value = _load_rows(pre_values, pre_stride, row, pre_columns, mask, PRE_DIM)
            product = tl.sum(pre_value * x[None, :], axis=1)
            factor = _activation(product, ACTIVATION)
        else:
            factor = tl.full([BLOCK_K], 1.0, tl.float32)
        if HAS_BLOCKS:
            block = tl.load(blocks + token * K + reads, mask, 0)
            value *= _load_rows(gradients, VALUE_DIM, block, columns, mask, VALUE_DIM)
        else:
            value *= whole_gradient[None, :]
        factor_gradient = tl.zeros([BLOCK_K], tl.float32)
        for core in tl.static_range(CORES):
            core_of_column = columns // (VALUE_DIM // CORES)
            product_of_core = tl.sum(tl.where((core_of_column == core)[None, :], value, 0.0), axis=1)
            place = (token * K + reads) * CORES + core
            score = tl.load(scores + place, mask, 0.0)
            tl.store(score_gradients + place, product_of_core * factor, mask)
            tl.store(weights + place, score * factor, mask)
            factor_gradient += score * product_of_core
        if PRE_DIM > 0:
            pre_weight = factor_gradient * _activation_gradient(product, ACTIVATION)
            tl.store(pre_weights + token * K + reads, pre_weight, mask)
            input_gradient += pre_weight[:, None] * pre_value
    if PRE_DIM > 0:
        place = input_gradients + token * PRE_DIM + pre_columns
        tl.store(place, tl.sum(input_gradient, axis=0), pre_columns < PRE_DIM)


@lru_cache
def _sizes(k: int, cores: int, value_dim: int, pre_dim: int, *, backward: bool) -> dict[str, int]:
    """Compile-time sizes: as many rows at once as fill a warp's registers with loads that are under way."""
    block_v, block_p = (next_power_of_2(max(width, 1)) for width in (value_dim, pre_dim))
    width = max(block_v, block_p)
    num_warps = max(1, width // (1024 if backward else 512))
    block_k = 4 if backward else 2048 * num_warps // width
    return {
        "K": k,
        "CORES": cores,
        "VALUE_DIM": value_dim,
        "PRE_DIM": pre_dim,
        "BLOCK_K": min(next_power_of_2(k), block_k, 16),
        "BLOCK_V": block_v,
        "BLOCK_P": block_p,
        "num_warps": num_warps,
    }


def _forward(
    scores: Tensor,
    rows: Tensor,
    blocks: Tensor | None,
    values: Tensor,
    pre_values: Tensor | None,
    pre_input: Tensor | None,
    link: Tensor,
    number: Tensor,
    pre_activation: str,
    num_blocks: int,
    dtype: torch.dtype,
) -> Tensor:
    state = TableState.find(number)
    if state is not None:
        state.forget_failed_passes()
    tokens, k, cores = scores.shape
    output = values.new_empty((tokens, num_blocks * values.shape[1]), dtype=dtype)
    if not tokens:
        return output
    value_copy, pre_copy = _compute_tables(number, values, pre_values, dtype)
    _lookup_kernel(
        (tokens, num_blocks), scores, rows, blocks,
        value_copy, value_copy.stride(0), pre_copy, 0 if pre_copy is None else pre_copy.stride(0), pre_input, output,
        HAS_BLOCKS=blocks is not None, ACTIVATION=pre_activation,
        **_sizes(k, cores, values.shape[1], 0 if pre_input is None else pre_input.shape[1], backward=False),
    )  # fmt: skip
    return output


def _fake(
    scores: Tensor,
    rows: Tensor,
    blocks: Tensor | None,
    values: Tensor,
    pre_values: Tensor | None,
    pre_input: Tensor | None,
    link: Tensor,
    number: Tensor,
    pre_activation: str,
    num_blocks: int,
    dtype: torch.dtype,
) -> Tensor:
    return values.new_empty((scores.shape[0], num_blocks * values.shape[1]), dtype=dtype)


def _backward(
    gradient: Tensor,
    scores: Tensor,
    rows: Tensor,
    blocks: Tensor | None,
    values: Tensor,
    pre_values: Tensor | None,
    pre_input: Tensor | None,
    number: Tensor,
    pre_activation: str,
    table_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, k, cores = scores.shape
    score_gradients, weights = torch.empty_like(scores), torch.empty_like(scores)
    input_gradients = scores.new_empty(0) if pre_input is None else torch.empty_like(pre_input)
    pre_weights = None if pre_input is None else scores.new_empty(tokens, k)
    gradient = gradient.contiguous()
    if tokens:
        value_copy, pre_copy = _compute_tables(number, values, pre_values, gradient.dtype)
        _lookup_backward_kernel(
            (tokens,), gradient, scores, rows, blocks,
            value_copy, value_copy.stride(0), pre_copy, 0 if pre_copy is None else pre_copy.stride(0), pre_input,
            score_gradients, input_gradients, weights, pre_weights, gradient.shape[1],
            HAS_BLOCKS=blocks is not None, ACTIVATION=pre_activation,
            **_sizes(k, cores, values.shape[1], 0 if pre_input is None else pre_input.shape[1], backward=True),
        )  # fmt: skip
    if table_gradient:
        state = TableState.find(number)
        assert state is not None
        state.add_products(Products(rows, blocks, weights, gradient, pre_weights, pre_input))
    return score_gradients, input_gradients, scores.new_zeros(1)


def _backward_fake(
    gradient: Tensor,
    scores: Tensor,
    rows: Tensor,
    blocks: Tensor | None,
    values: Tensor,
    pre_values: Tensor | None,
    pre_input: Tensor | None,
    number: Tensor,
    pre_activation: str,
    table_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    input_gradients = scores.new_empty(0) if pre_input is None else torch.empty_like(pre_input)
    return torch.empty_like(scores), input_gradients, scores.new_empty(1)


def _backward_of_operator(
    gradient: Tensor,
    scores: Tensor,
    rows: Tensor,
    blocks: Tensor | None,
    values: Tensor,
    pre_values: Tensor | None,
    pre_input: Tensor | None,
    number: Tensor,
    pre_activation: str,
    table_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_backward`, but the table's state keeps copies: a compiler uses the memory of the originals again."""
    gradient, rows = gradient.clone(), rows.clone()
    blocks, pre_input = (None if part is None else part.clone() for part in (blocks, pre_input))
    return _backward(
        gradient, scores, rows, blocks, values, pre_values, pre_input, number, pre_activation, table_gradient
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, rows, blocks, values, pre_values, pre_input, _, number, ctx.pre_activation, *_ = inputs
    ctx.save_for_backward(scores, rows, blocks, values, pre_values, pre_input, number)


def _gradients(backward: Callable[..., Any], ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    score_gradients, input_gradients, link_gradient = backward(
        gradient, *ctx.saved_tensors, ctx.pre_activation, needs[6]
    )
    return (
        score_gradients,
        *(None,) * 4,
        input_gradients if needs[5] else None,
        link_gradient if needs[6] else None,
        *(None,) * 4,
    )


_weighted_lookup = FusedOperator(
    "weighted_lookup",
    forward=_forward,
    fake=_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    backward_operator=_backward_of_operator,
    save=_save,
    gradients=_gradients,
    # What it leaves with the table's state, a replayed graph of kernels would not leave there.
    backward_tags=(torch.Tag.cudagraph_unsafe,),
)
