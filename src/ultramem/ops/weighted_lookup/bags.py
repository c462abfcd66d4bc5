"""Weighted lookups on CPUs, which copy no rows.

Plain PyTorch gathers the rows of all tokens before it adds them up. Here the reads are the entries of a sparse matrix,
of which each line, or bag, is a sum of rows. With weights w (cores, reads), a vector g (bags, width) for each bag and a
table V (rows, width), all widths cut into a slice for each core c,

    f = Σ w[c, i] <g[bag of i]_c, V[row of i]_c>  over all reads i and cores c

has three derivatives: sums of rows by g, products with rows by w, and the gradient of the rows by V. As f is linear in
each of the three, they are each other's derivatives too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem.ops.backend import runs_now_on_cpu
from ultramem.ops.weighted_lookup.naive import ACTIVATIONS
from ultramem.ops.weighted_lookup.reads import Reads

with warnings.catch_warnings():  # PyTorch says once that sparse tensors are new
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))

_HAS_MKL: bool = torch.backends.mkl.is_available()  # `sampled_addmm` needs it


class Bags:
    """Which row each read is of, and which bag, in the order of the bags.

    Attributes:
        rows: (reads,), int64, rows of the table.
        bags: (reads,), int64, ascending.
        starts: (bags + 1,), int64, each bag's first read, and the number of reads.
        num_rows: of the table.
    """

    def __init__(self, rows: Tensor, bags: Tensor, starts: Tensor, num_rows: int) -> None:
        self.rows, self.bags, self.starts, self.num_rows = rows, bags, starts, num_rows

    @classmethod
    def uniform(cls, rows: Tensor, num_rows: int) -> Bags:
        """Bags with a line of rows (bags, k) each."""
        bags, k = rows.shape
        return cls(
            rows.flatten(),
            torch.arange(bags).unsqueeze(1).expand(-1, k).flatten(),
            torch.arange(0, rows.numel() + 1, max(k, 1)),
            num_rows,
        )

    @cached_property
    def by_row(self) -> tuple[Tensor, Tensor]:
        """Reads (reads,) in the order of their rows, and each row's first place in it (rows + 1,)."""
        return self.rows.sort(stable=True).indices, _starts(self.rows, self.num_rows)


class Source(NamedTuple):
    """A contiguous table to read, and where its gradient goes.

    Attributes:
        table: (rows, width).
        link: by which autograd knows that lookups depend on the table. With it they leave the gradient to `collect`.
        collect: takes weights (cores, reads), vectors (bags, width) and bags, of which `add_row_gradients` makes it.
    """

    table: Tensor
    link: Tensor | None = None
    collect: Callable[[Tensor, Tensor, Bags], None] | None = None


def supports(reads: Reads, values: Tensor, pre_values: Tensor | None) -> bool:
    """Whether these are tensors on a CPU, of a dtype and size that all operations take, and nothing is compiled."""
    tables = [values] if pre_values is None else [values, pre_values]
    return (
        _HAS_MKL
        and runs_now_on_cpu(reads.rows)
        and all(table.device.type == "cpu" and table.is_contiguous() for table in tables)
        and values.dtype in (torch.float32, torch.float64)
        and 0 < reads.rows.numel() <= len(reads.rows) * len(values)  # as many as a sparse matrix may have
    )


def weighted_lookup(reads: Reads, values: Source, pre_values: Source | None = None) -> Tensor:
    """As the definition, `ultramem.ops.weighted_lookup.naive.weighted_lookup`, of tables by which to find gradients."""
    dtype, num_rows = values.table.dtype, len(values.table)
    low, high = reads.rows.aminmax()
    if low < 0 or high >= num_rows:
        raise IndexError(f"index out of range: rows are from 0 to {num_rows - 1}, not {int(low)} to {int(high)}")
    scores, bags = reads.scores.to(dtype), Bags.uniform(reads.rows, num_rows)
    weights = scores.flatten(0, 1).t().contiguous()
    if reads.pre_input is not None:
        assert pre_values is not None
        products = row_products(reads.pre_input.to(dtype), pre_values, bags)
        weights = weights * ACTIVATIONS[reads.pre_activation](products)
    if reads.virtual_copies is not None:
        bags, order = _split(bags, reads.virtual_copies.flatten(), reads.num_virtual_copies)
        weights = weights.index_select(1, order)
    return row_sums(weights, values, bags).view(len(reads.rows), -1)


def _split(bags: Bags, copies: Tensor, num_copies: int) -> tuple[Bags, Tensor]:
    """A bag for each virtual copy (reads,) of each bag, and the order of the reads in them."""
    numbers, order = (bags.bags * num_copies + copies).sort(stable=True)
    starts = _starts(numbers, (len(bags.starts) - 1) * num_copies)
    return Bags(bags.rows[order], numbers, starts, bags.num_rows), order


def _starts(numbers: Tensor, count: int) -> Tensor:
    """How many numbers (n,) are smaller than each from 0 to `count`, all of them below it: (count + 1,)."""
    return F.pad(torch.bincount(numbers, minlength=count).cumsum(0), (1, 0))


def row_sums(weights: Tensor, source: Source, bags: Bags) -> Tensor:
    """Weighted sums of the rows of each bag, (bags, width), with weights (cores, reads)."""
    sums: Tensor = _RowSums.apply(weights, source.table, source.link, source.collect, bags)
    return sums


def row_products(vectors: Tensor, source: Source, bags: Bags, cores: int = 1) -> Tensor:
    """Products of rows and their bags' vectors (bags, width), slice by slice: (cores, reads)."""
    products: Tensor = _RowProducts.apply(vectors, source.table, source.link, source.collect, bags, cores)
    return products


def add_row_gradients(total: Tensor, weights: Tensor, vectors: Tensor, bags: Bags) -> Tensor:
    """Add to each row of `total` (rows, width) its reads' vectors (bags, width), weighted (cores, reads), in place."""
    cores = len(weights)
    if bags.num_rows > len(bags.rows):
        parts = weights.t().unsqueeze(2) * vectors[bags.bags].unflatten(1, (cores, -1))
        return total.index_add_(0, bags.rows, parts.flatten(1).to(total.dtype))
    order, starts = bags.by_row
    numbers = bags.bags.index_select(0, order)
    for part, vector, weight in zip(total.chunk(cores, 1), vectors.chunk(cores, 1), weights, strict=True):
        part += _bag_sums(numbers, vector.contiguous(), starts, weight.index_select(0, order))
    return total


def _bag_sums(indices: Tensor, table: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(indices, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


class _RowSums(torch.autograd.Function):
    @staticmethod
    def forward(weights: Tensor, table: Tensor, link: Tensor | None, collect: Any, bags: Bags) -> Tensor:
        cores = len(weights)
        slices = table.view(-1, table.shape[1] // cores)
        rows = bags.rows if cores == 1 else bags.rows * cores
        sums = [
            _bag_sums(rows + core if core else rows, slices, bags.starts, weight) for core, weight in enumerate(weights)
        ]
        return torch.cat(sums, dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights, table, link, ctx.collect, ctx.bags = inputs
        ctx.save_for_backward(weights, table, link)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, table, link = ctx.saved_tensors
        of_weights = of_table = None
        if ctx.needs_input_grad[0]:
            of_weights = row_products(gradient, Source(table, link, ctx.collect), ctx.bags, len(weights))
        if ctx.needs_input_grad[1]:
            of_table = _RowGradients.apply(weights, gradient, ctx.bags)
        if link is not None:
            ctx.collect(weights, gradient, ctx.bags)
        return of_weights, of_table, None, None, None


class _RowProducts(torch.autograd.Function):
    @staticmethod
    def forward(vectors: Tensor, table: Tensor, link: Tensor | None, collect: Any, bags: Bags, cores: int) -> Tensor:
        slices, zeros = table.view(-1, table.shape[1] // cores), vectors.new_zeros(len(bags.rows))
        shape, products = (len(vectors), len(slices)), []
        for core, vector in enumerate(vectors.chunk(cores, 1)):
            rows = bags.rows * cores + core
            places = torch.sparse_csr_tensor(bags.starts, rows, zeros, shape, check_invariants=False)
            products.append(torch.sparse.sampled_addmm(places, vector.contiguous(), slices.t(), beta=0.0).values())
        return torch.stack(products)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        vectors, table, link, ctx.collect, ctx.bags, _ = inputs
        ctx.save_for_backward(vectors, table, link)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        vectors, table, link = ctx.saved_tensors
        of_vectors = of_table = None
        if ctx.needs_input_grad[0]:
            of_vectors = row_sums(gradient, Source(table, link, ctx.collect), ctx.bags)
        if ctx.needs_input_grad[1]:
            of_table = _RowGradients.apply(gradient, vectors, ctx.bags)
        if link is not None:
            ctx.collect(gradient, vectors, ctx.bags)
        return of_vectors, of_table, None, None, None, None


class _RowGradients(torch.autograd.Function):
    @staticmethod
    def forward(weights: Tensor, vectors: Tensor, bags: Bags) -> Tensor:
        return add_row_gradients(vectors.new_zeros(bags.num_rows, vectors.shape[1]), weights, vectors, bags)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights, vectors, ctx.bags = inputs
        ctx.save_for_backward(weights, vectors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, vectors = ctx.saved_tensors
        source, of_weights, of_vectors = Source(gradient.contiguous()), None, None
        if ctx.needs_input_grad[0]:
            of_weights = row_products(vectors, source, ctx.bags, len(weights))
        if ctx.needs_input_grad[1]:
            of_vectors = row_sums(weights, source, ctx.bags)
        return of_weights, of_vectors, None
