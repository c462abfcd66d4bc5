"""Weighted sums of table rows with Triton kernels: rows are read once in either direction and never written out."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem.ops.backend import KERNEL_DTYPES, autocast_dtype, can_run_kernels, kernels_are_demanded
from ultramem.ops.kernels.launching import Launcher, ceil_div, next_power_of_2
from ultramem.ops.kernels.operators import FusedOperator, find
from ultramem.ops.kernels.overlapping import can_overlap, wait_for_others
from ultramem.ops.weighted_lookup.reads import Products, Reads
from ultramem.ops.weighted_lookup.table_gradient import table_gradients

# Widest rows that one program holds several of in registers.
_MAX_WIDTH = 4096
_MULTIPROCESSORS = 132  # of a GPU, to be kept busy
_FEW = 8 * _MULTIPROCESSORS  # programs that are too few to hide each other's waiting
_STEP_BYTES = 2**15  # of rows that are loaded at once; three steps fit into any GPU's shared memory
_ACTIVATIONS = (None, "gelu", "silu")  # of `_activation` and its gradient


class TableCopy(Protocol):
    """Makes a copy of a table in the dtype to compute in, for all lookups until the table changes."""

    def in_dtype(self, values: Tensor, pre_values: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Values and pre-values in `dtype`, or in a narrower one that they have."""


class ProductCollector(Protocol):
    """Makes one gradient of a table from what the lookups of a backward pass know."""

    def add_products(self, products: Products) -> None:
        """Keep what one knows."""


def supports(
    reads: Reads, values: Tensor, pre_values: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> bool:
    """Whether there are kernels for these arguments."""
    tables = [values] if pre_values is None else [values, pre_values]
    return (
        can_run_kernels(values)
        and reads.pre_activation in _ACTIVATIONS
        and all(part.dtype in KERNEL_DTYPES and part.shape[1] <= _MAX_WIDTH for part in tables)
        and autocast_dtype(values, dtype) in KERNEL_DTYPES
    )


def weighted_lookup(
    reads: Reads,
    values: Tensor,
    pre_values: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    link: Tensor | None = None,
    numbers: Tensor | None = None,
) -> Tensor:
    """As the definition in `naive.py`, computed and returned in autocast's dtype where that is on.

    Args, beyond those of the definition:
        dtype: to compute in and to return, without autocast; by default the values'.
        link: by which autograd knows that the lookup depends on the table. With it the table has no gradient from this
            lookup: what is known of it goes to the `ProductCollector`.
        numbers: (2,), int64, on the CPU, by which a `TableCopy` and a `ProductCollector` are found, or None.
    """
    dtype = autocast_dtype(values, dtype)
    if link is not None:
        values, pre_values = values.detach(), None if pre_values is None else pre_values.detach()
    rows, scores = reads.rows.contiguous(), reads.scores.float().contiguous()
    pre_input = None if reads.pre_input is None else reads.pre_input.to(dtype)
    if pre_input is not None and pre_input.stride(1) != 1:
        pre_input = pre_input.contiguous()
    copies = None if reads.virtual_copies is None else reads.virtual_copies.contiguous()
    prepared = rows, scores, pre_input, reads.pre_activation, copies, reads.sums
    result: Tensor = _weighted_lookup(*prepared, values, pre_values, link, numbers, dtype)
    return result


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
    scores, rows, copies, values, value_stride, pre_values, pre_stride, pre_input, input_stride, output,
    HAS_COPIES: tl.constexpr, ACTIVATION: tl.constexpr, K: tl.constexpr, CORES: tl.constexpr,
    VALUE_DIM: tl.constexpr, PRE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A slice of one token's sum, of one virtual copy if these are kept apart."""
    wait_for_others(OVERLAPS)
    token, copy = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns, pre_columns = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_P)
    if PRE_DIM > 0:
        x = tl.load(pre_input + token * input_stride + pre_columns, pre_columns < PRE_DIM, 0.0).to(tl.float32)
    total = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        reads = start + tl.arange(0, BLOCK_K)
        mask = reads < K
        row = tl.load(rows + token * K + reads, mask, 0)
        if HAS_COPIES:
            mask = mask & (tl.load(copies + token * K + reads, mask, -1) == copy)
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
    place = output + (token * tl.num_programs(1) + copy) * VALUE_DIM + columns
    tl.store(place, tl.sum(total, axis=0), columns < VALUE_DIM)


@Launcher
@triton.jit
def _lookup_backward_kernel(
    gradients, scores, rows, copies, values, value_stride, pre_values, pre_stride, pre_input,
    score_gradients, input_gradients, weights, pre_weights, gradient_width,
    HAS_COPIES: tl.constexpr, ACTIVATION: tl.constexpr, K: tl.constexpr, CORES: tl.constexpr,
    VALUE_DIM: tl.constexpr, PRE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradients of one token's scores and pre-value input, and what its reads weigh in the table's gradient."""
    token = tl.program_id(0).to(tl.int64)
    columns, pre_columns = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_P)
    gradients += token * gradient_width
    if PRE_DIM > 0:
        x = tl.load(pre_input + token * PRE_DIM + pre_columns, pre_columns < PRE_DIM, 0.0).to(tl.float32)
        input_gradient = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    if not HAS_COPIES:
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
        if HAS_COPIES:
            copy = tl.load(copies + token * K + reads, mask, 0)
            value *= _load_rows(gradients, VALUE_DIM, copy, columns, mask, VALUE_DIM)
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


@lru_cache
def _few_sizes(k: int, cores: int, value_dim: int, pre_dim: int, programs: int, item_bytes: int) -> dict[str, int]:
    """Compile-time sizes of a forward pass that would have few programs, in which waiting for rows takes the time.

    Values are cut into slices until programs fill a GPU; each reads all pre-values, of which most then come from the
    cache. Several warps have as many loads under way as fit.
    """
    block_v, block_p = (next_power_of_2(max(width, 1)) for width in (value_dim, pre_dim))
    while block_v > 64 and programs * ceil_div(value_dim, block_v) < 2 * _MULTIPROCESSORS:
        block_v //= 2
    rows = max(_STEP_BYTES // (item_bytes * (block_v + block_p)), 1)
    block_k = min(next_power_of_2(k), 1 << rows.bit_length() - 1)
    sizes = _sizes(k, cores, value_dim, pre_dim, backward=False)
    return sizes | {"BLOCK_K": block_k, "BLOCK_V": block_v, "STAGES": 4, "num_warps": 8}


_READS = "Tensor rows, Tensor scores, Tensor? pre_input, str? pre_activation, Tensor? copies, int num_copies"
_TABLE = "Tensor values, Tensor? pre_values"


def _tables(numbers: Tensor | None, values: Tensor, pre_values: Tensor | None, dtype: torch.dtype) -> list[Any]:
    """Values, pre-values and the strides of their rows, in the dtype to compute in or a narrower one."""
    copy: TableCopy | None = find(numbers, 0)
    if copy is not None:
        values, pre_values = copy.in_dtype(values, pre_values, dtype)
    else:
        values, pre_values = values.to(dtype), None if pre_values is None else pre_values.to(dtype)
    return [values, values.stride(0), pre_values, 0 if pre_values is None else pre_values.stride(0)]


def _forward(*inputs: Any) -> Tensor:
    reads, (values, pre_values, _, numbers, dtype) = Reads(*inputs[:6]), inputs[6:]
    output = _fake(*inputs)
    tokens, k, cores = reads.scores.shape
    programs, widths = tokens * reads.num_virtual_copies, (values.shape[1], _width(reads.pre_input))
    if programs <= _FEW and kernels_are_demanded():
        sizes = _few_sizes(k, cores, *widths, programs, dtype.itemsize) | {"OVERLAPS": can_overlap(values.device)}
    else:
        sizes = _sizes(k, cores, *widths, backward=False) | {"STAGES": 1, "OVERLAPS": False}
    if tokens:
        _lookup_kernel(
            (tokens, reads.num_virtual_copies, ceil_div(widths[0], sizes["BLOCK_V"])), reads.scores, reads.rows,
            reads.virtual_copies, *_tables(numbers, values, pre_values, dtype), reads.pre_input,
            0 if reads.pre_input is None else reads.pre_input.stride(0), output,
            HAS_COPIES=reads.virtual_copies is not None, ACTIVATION=reads.pre_activation or "", **sizes,
        )  # fmt: skip
    return output


def _fake(*inputs: Any) -> Tensor:
    rows, num_copies, values, dtype = inputs[0], inputs[5], inputs[6], inputs[-1]
    output: Tensor = values.new_empty((rows.shape[0], num_copies * values.shape[1]), dtype=dtype)
    return output


def _width(pre_input: Tensor | None) -> int:
    return 0 if pre_input is None else pre_input.shape[1]


def _backward(gradient: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Gradients of scores, pre-value input, values, pre-values and link; None where none is wanted."""
    reads, (values, pre_values, numbers, has_link, needs) = Reads(*inputs[:6]), inputs[6:]
    if reads.pre_input is not None:
        reads = reads._replace(pre_input=reads.pre_input.contiguous())
    tokens, k, cores = reads.scores.shape
    score_gradients, weights = torch.empty_like(reads.scores), torch.empty_like(reads.scores)
    input_gradients = None if reads.pre_input is None else torch.empty_like(reads.pre_input)
    pre_weights = None if reads.pre_input is None else reads.scores.new_empty(tokens, k)
    gradient = gradient.contiguous()
    if tokens:
        _lookup_backward_kernel(
            (tokens,), gradient, reads.scores, reads.rows, reads.virtual_copies,
            *_tables(numbers, values, pre_values, gradient.dtype), reads.pre_input,
            score_gradients, input_gradients, weights, pre_weights, gradient.shape[1],
            HAS_COPIES=reads.virtual_copies is not None, ACTIVATION=reads.pre_activation or "",
            **_sizes(k, cores, values.shape[1], _width(reads.pre_input), backward=True),
        )  # fmt: skip
    products = Products(reads.rows, reads.virtual_copies, weights, gradient, pre_weights, reads.pre_input)
    if has_link:
        collector: ProductCollector = find(numbers, 1)
        collector.add_products(products)
        return score_gradients, input_gradients, None, None, reads.scores.new_zeros(1)
    tables = [part if needed else None for part, needed in zip((values, pre_values), needs, strict=True)]
    return score_gradients, input_gradients, *table_gradients([products], tables), None


def _backward_of_operator(gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """As `_backward`, with an empty tensor for None, or zeros for a table that was not read.

    What is kept beyond it are copies: a compiler uses the memory of the originals again.
    """
    has_link = inputs[-2]
    if has_link:
        gradient = gradient.clone()
        # Rows, pre-value input and virtual copies.
        inputs = tuple(
            part.clone() if place in (0, 2, 4) and part is not None else part for place, part in enumerate(inputs)
        )
    scores, (values, pre_values, _, _, needs) = inputs[1], inputs[6:]
    whole = [
        part if needed and not has_link else None for part, needed in zip((values, pre_values), needs, strict=True)
    ]

    def absent(table: Tensor | None) -> Tensor:
        if table is None:
            return scores.new_empty(0)
        return torch.zeros_like(table, memory_format=torch.contiguous_format)

    found = _backward(gradient, *inputs)
    return tuple(
        absent(table) if part is None else part for part, table in zip(found, (None, None, *whole, None), strict=True)
    )


def _backward_fake(gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    reads, (values, pre_values, _, has_link, needs) = Reads(*inputs[:6]), inputs[6:]
    scores = reads.scores
    input_gradients = scores.new_empty(0) if reads.pre_input is None else torch.empty_like(reads.pre_input)
    tables = (
        torch.empty_like(part, memory_format=torch.contiguous_format)
        if needed and not has_link
        else scores.new_empty(0)
        for part, needed in zip((values, pre_values), needs, strict=True)
    )
    return torch.empty_like(scores), input_gradients, *tables, scores.new_empty(1 if has_link else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, scores, pre_input, ctx.pre_activation, copies, ctx.num_copies, values, pre_values, link, numbers, _ = inputs
    ctx.save_for_backward(rows, scores, pre_input, copies, values, pre_values, numbers)
    ctx.has_link = link is not None


def _gradients(backward: Callable[..., Any], ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows, scores, pre_input, copies, *table = ctx.saved_tensors
    needs = ctx.needs_input_grad
    reads = rows, scores, pre_input, ctx.pre_activation, copies, ctx.num_copies
    found = backward(gradient, *reads, *table, ctx.has_link and needs[8], list(needs[6:8]))
    of_scores, of_input, *of_table = (
        part if needed else None for part, needed in zip(found, (needs[1], needs[2], *needs[6:9]), strict=True)
    )
    return None, of_scores, of_input, None, None, None, *of_table, None, None


_weighted_lookup = FusedOperator(
    "weighted_lookup",
    _forward,
    _fake,
    _backward,
    _backward_fake,
    _save,
    _gradients,
    backward_operator=_backward_of_operator,
    # What it leaves with the table, a replayed graph of kernels would not leave there.
    backward_tags=(torch.Tag.cudagraph_unsafe,),
    schema=f"({_READS}, {_TABLE}, Tensor? link, Tensor? numbers, ScalarType dtype) -> Tensor",
    backward_schema=(
        f"(Tensor gradient, {_READS}, {_TABLE}, Tensor? numbers, bool has_link, bool[] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
