"""One gradient of a table in a backward pass, however many lookups read it."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem.errors import UltraMemError
from ultramem.ops.backend import HAS_KERNELS
from ultramem.ops.weighted_lookup import bags
from ultramem.ops.weighted_lookup.reads import Products
from ultramem.tables.torch_internals import (
    NO_BACKWARD_PASS,
    accumulates,
    current_backward_pass,
    keep_until_it_ends,
    take_gradient,
)

if HAS_KERNELS:
    from ultramem.ops.weighted_lookup.table_gradient import table_gradients

_CONSTANT = (
    "create_graph=True: a table's gradient cannot be differentiated again; freeze the table, or use "
    "ultramem.ops.weighted_lookup"
)


class GradientAccumulator:
    """Collects what the lookups of a backward pass know of a table's gradient, which is then made in one go.

    Ordinary autograd would give each lookup a gradient as large as the table and add them up. A pass has four steps:

    1. Forward, each lookup takes the link, a tensor of one element made from the table (`TableLink`). It only tells
       autograd that the lookup depends on the table.
    2. Backward, each lookup leaves what it knows: sums of rows (`add_rows`, plain PyTorch) or products
       (`add_products`, kernels). They are kept apart by backward pass: others may be under way in other threads.
    3. When all lookups have done so, autograd comes to the link's node, which makes the table's gradient of it (`take`)
       and hands it on, to the parameters.
    4. What was left belongs to the backward pass, and goes with it, also if it fails.

    An optimizer that steps a table by products needs no gradient: with `defers`, what a pass leaves is kept for it,
    unless another pass has left something before, as with several micro-batches.

    Attributes:
        used: whether a backward pass has reached a lookup since this was last set to False.
        defers: whether an optimizer takes the products.
        deferred: the products of the last pass, for the optimizer.
    """

    def __init__(self) -> None:
        self.used = self.defers = False
        self.deferred: list[Products] = []
        self._passes: WeakValueDictionary[int, _Pass] = WeakValueDictionary()

    def add_rows(self, which: int, table: Tensor, rows: Tensor, gradient: Tensor) -> None:
        """Add `gradient` (*rows.shape, dim) to the gradients of the values' (0) or pre-values' (1) rows."""
        total = self._total(which, table)
        total.index_add_(0, rows.flatten(), gradient.flatten(0, -2).to(total.dtype))

    def source(self, which: int, table: Tensor, link: Tensor | None) -> bags.Source:
        """Values (0) or pre-values (1) for a lookup in bags, which leaves here what it knows if there is a link."""
        if link is None or not table.requires_grad:
            return bags.Source(table)
        table = table.detach()
        return bags.Source(table, link, partial(self.add_bags, which, table))

    def add_bags(self, which: int, table: Tensor, weights: Tensor, vectors: Tensor, reads: bags.Bags) -> None:
        """Add what a lookup in bags knows of the gradients of the values' (0) or pre-values' (1) rows."""
        if torch.is_grad_enabled():  # create_graph=True
            self._current().differentiated = True
        with torch.no_grad():
            bags.add_row_gradients(self._total(which, table), weights, vectors, reads)

    def add_products(self, products: Products) -> None:
        """Keep what a fused lookup knows."""
        self._current().products.append(products)

    def take(self, tables: list[Tensor | None], nodes: list[Any]) -> list[Tensor | None]:
        """The gradients of values and pre-values that this backward pass has brought, in the tables' dtype.

        A table that needs no gradient is None. `nodes` are those of the autograd graph that gradients go to, or None.
        """
        found = self._passes.pop(current_backward_pass(), None) or _Pass()
        if found.differentiated:  # what was added up here would be a constant
            raise UltraMemError(_CONSTANT)
        sums, products = found.sums, found.products
        found.sums, found.products = [None, None], []  # the engine holds it for longer
        if self.defers and self._can_defer(sums, tables, nodes):
            self.deferred = products
            return [None, None]
        if products or self.deferred:
            buffers = [take_gradient(node) for node in nodes]
            products, self.deferred = self.deferred + products, []
            return table_gradients(products, tables, sums, buffers)
        return [
            None if total is None or table is None else total.to(table.dtype)
            for total, table in zip(sums, tables, strict=True)
        ]

    def _total(self, which: int, table: Tensor) -> Tensor:
        sums = self._current().sums
        total = sums[which]
        if total is None:
            dtype = torch.promote_types(table.dtype, torch.float32)
            total = sums[which] = torch.zeros_like(table, dtype=dtype)
        return total

    def _can_defer(self, sums: list[Tensor | None], tables: list[Tensor | None], nodes: list[Any]) -> bool:
        learning = [node for table, node in zip(tables, nodes, strict=True) if table is not None]
        nothing_yet = not self.deferred and sums == [None, None]
        return nothing_yet and all(accumulates(node) and node.variable.grad is None for node in learning)

    def _current(self) -> _Pass:
        self.used = True
        number = current_backward_pass()
        found = self._passes.get(number)
        if found is None:
            found = self._passes[number] = _Pass()
            keep_until_it_ends(found)
        return found


class _Pass:
    """What the lookups of one backward pass left: sums over rows, in float32 or wider, and products."""

    def __init__(self) -> None:
        self.sums: list[Tensor | None] = [None, None]
        self.products: list[Products] = []
        self.differentiated = False  # whether the gradients of this pass are to be differentiated again


class TableLink:
    """What lookups take to tell autograd that they depend on a table."""

    def __init__(self, accumulator: GradientAccumulator) -> None:
        self._accumulator = accumulator
        self._link: Tensor | None = None
        self._tables: list[tuple[object, ...]] = []  # what it was made from

    def get(self, values: Tensor, pre_values: Tensor | None) -> Tensor | None:
        """The link (1,) of these tables; None where no gradient is wanted, or a compiled program finds none.

        A compiler traces lookups with the link that it finds: `make` is to be called when the table changes.
        """
        if not torch.is_grad_enabled():
            return None
        fits = self._tables == _describe(values, pre_values)
        if torch.compiler.is_compiling():
            return self._link if fits else None
        # Autograd runs younger nodes first, so the link's is to be as young as the pass: gradients must be there when
        # FSDP collects them. And the gradient is made on the stream on which the link was: if that is another one than
        # the lookups', no CUDA graph can be captured.
        old = self._accumulator.used and current_backward_pass() == NO_BACKWARD_PASS
        if old or not fits or self._stream != _current_stream(values):
            self.make(values, pre_values)
        return self._link

    def make(self, values: Tensor, pre_values: Tensor | None) -> None:
        """Make it from these tables: leaves such as parameters or, for one pass, results of operations."""
        self._link = None  # also the old one's graph
        self._tables, self._stream = _describe(values, pre_values), _current_stream(values)
        self._accumulator.used = False
        with torch.inference_mode(False), torch.enable_grad():
            self._link = _Link.apply(self._accumulator, values, pre_values)


def _describe(values: Tensor, pre_values: Tensor | None) -> list[tuple[object, ...]]:
    """Which tables they are, and what may change of them."""
    tables = [values] if pre_values is None else [values, pre_values]
    return [(id(table), table.dtype, table.device, table.requires_grad) for table in tables]


def _current_stream(tensor: Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def gather(
    which: int, table: Tensor, rows: Tensor, dtype: torch.dtype, link: Tensor | None, accumulator: GradientAccumulator
) -> Tensor:
    """Rows (*rows.shape, dim) of the values (0) or pre-values (1), whose gradients are added up in an accumulator.

    They are in `dtype`, and so are their gradients. Without a link, and in compiled programs, this is plain PyTorch.
    """
    if link is None or not table.requires_grad or torch.compiler.is_compiling():
        return F.embedding(rows, table).to(dtype)
    gathered: Tensor = _Gather.apply(link, table.detach(), rows, dtype, accumulator, which)
    return gathered


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, accumulator: GradientAccumulator, values: Tensor, pre_values: Tensor | None) -> Tensor:
        ctx.accumulator = accumulator
        ctx.tables = [values.detach(), None if pre_values is None else pre_values.detach()]
        ctx.set_materialize_grads(False)
        return torch.zeros(1, device=values.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nodes = [*(node for node, _ in ctx.next_functions), None][:2]
        wanted = [table if needed else None for table, needed in zip(ctx.tables, ctx.needs_input_grad[1:], strict=True)]
        return (None, *ctx.accumulator.take(wanted, nodes))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        link: Tensor,
        table: Tensor,
        rows: Tensor,
        dtype: torch.dtype,
        accumulator: GradientAccumulator,
        which: int,
    ) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.table, ctx.accumulator, ctx.which = table, accumulator, which
        return F.embedding(rows, table).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what is added up here would be a constant
            raise UltraMemError(_CONSTANT)
        (rows,) = ctx.saved_tensors
        ctx.accumulator.add_rows(ctx.which, ctx.table, rows, gradient)
        return (None,) * 6
