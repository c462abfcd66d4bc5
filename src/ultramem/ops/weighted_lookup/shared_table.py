"""One gradient accumulation for a table that many lookups of one pass read.

Ordinary autograd would give each lookup a gradient as large as the table and add them up. Here the lookups leave what
they know of it, and once the last of them is done the table's gradient is made in one go.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook


class SharedTable:
    """A table whose gradient is made once in a backward pass, however many lookups read it through this object.

    It may serve any number of passes, several at once too. The table is a leaf such as a parameter, or, for one pass,
    the result of operations.

    Args:
        values: (rows, value_dim).
        pre_values: (rows, pre_value_dim), same dtype, or None.

    Attributes:
        state: what the lookups share.
        number: (1,), int64, on the CPU: by this number operations find the state, compiled ones too.
    """

    def __init__(self, values: Tensor, pre_values: Tensor | None = None) -> None:
        self.values, self.pre_values = values, pre_values
        self._kinds, self._trained = _describe(values, pre_values)
        self.state = TableState(values, pre_values)
        self.number = torch.tensor([self.state.number], device="cpu")
        self._make_link()

    @property
    def link(self) -> Tensor:
        """(1,); it only tells autograd that the lookups depend on the table."""
        if not torch.compiler.is_compiling():
            self.renew()
        assert self._link is not None
        return self._link

    def renew(self) -> None:
        """Make the link anew if need be; call before a forward pass in which compiled programs look up.

        Autograd runs younger nodes first, so the link's is to be as young as the pass: gradients must be there when
        FSDP collects them.
        """
        used = self.state.backward_begun and torch._C._current_graph_task_id() == -1
        if used or self._stream != _current_stream(self.values):
            self._make_link()

    # The table's gradient is made, and accumulated, on the stream on which its link was: if that is another one than
    # the lookups', no CUDA graph can be captured.
    def _make_link(self) -> None:
        self._stream = _current_stream(self.values)
        self.state.backward_begun = False
        self._link: Tensor | None = None  # also the old one's graph
        with torch.inference_mode(False), torch.enable_grad():
            self._link = _Share.apply(self.state, self.values, self.pre_values)

    def serves(self, values: Tensor, pre_values: Tensor | None) -> bool:
        """Whether lookups of these tensors can go through this object."""
        if self.values is not values or self.pre_values is not pre_values:
            return False
        kinds, trained = _describe(values, pre_values)
        # A pass without gradients may be traced, where no other object can be made.
        return self._kinds == kinds and (self._trained == trained or not torch.is_grad_enabled())

    def gather_values(self, rows: Tensor) -> Tensor:
        """The values (*rows.shape, value_dim)."""
        return self._gather(0, self.values, rows)

    def gather_pre_values(self, rows: Tensor) -> Tensor:
        """The pre-values (*rows.shape, pre_value_dim)."""
        assert self.pre_values is not None
        return self._gather(1, self.pre_values, rows)

    def _gather(self, which: int, table: Tensor, rows: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and table.requires_grad):
            return F.embedding(rows, table)
        self.state.forget_failed_passes()
        gathered: Tensor = _Gather.apply(self.link, table.detach(), rows, self.state, which)
        return gathered


def _current_stream(tensor: Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def _describe(values: Tensor, pre_values: Tensor | None) -> tuple[list[Any], list[bool]]:
    """Dtypes and devices, and which of the tables are trained."""
    tables = [table for table in (values, pre_values) if table is not None]
    return [(table.dtype, table.device) for table in tables], [table.requires_grad for table in tables]


class Products(NamedTuple):
    """What a fused lookup's backward pass knows of the table's gradient.

    The gradient of row `rows[t, k]`, in core c's slice of the values, gains `weights[t, k, c] * gradients[t]` of the
    row's block; in the pre-values `pre_weights[t, k] * pre_inputs[t]`.

    Attributes:
        rows: (tokens, k), int64.
        blocks: (tokens, k), int64, or None.
        weights: (tokens, k, cores), float32.
        gradients: (tokens, blocks * value_dim), gradient of the lookup's result.
        pre_weights: (tokens, k), float32, or None.
        pre_inputs: (tokens, pre_value_dim), or None.
    """

    rows: Tensor
    blocks: Tensor | None
    weights: Tensor
    gradients: Tensor
    pre_weights: Tensor | None
    pre_inputs: Tensor | None


class _Pass:
    """What the lookups of one backward pass left: sums over rows, in float32 or wider, and products."""

    def __init__(self) -> None:
        self.sums: list[Tensor | None] = [None, None]
        self.products: list[Products] = []


class TableState:
    """What the lookups of one table share: gradients in the making, and a copy of the table to compute with.

    Attributes:
        number: by which it is found.
        tables: values and pre-values, or None.
        backward_begun: whether a backward pass has reached a lookup since the link was made.
    """

    _numbers = itertools.count()
    _all: ClassVar[WeakValueDictionary[int, TableState]] = WeakValueDictionary()

    def __init__(self, values: Tensor, pre_values: Tensor | None) -> None:
        self.number = next(self._numbers)
        self._all[self.number] = self
        self.tables = [values, pre_values]
        self.backward_begun = False
        self._passes: dict[int, _Pass] = {}
        self._copy: Tensor | None = None
        self._copied: list[tuple[int, int]] = []

    @classmethod
    def find(cls, number: Tensor) -> TableState | None:
        """The state of that number; it lives as long as its `SharedTable` or a graph with the table's gradient."""
        return cls._all.get(int(number))

    def add_rows(self, which: int, rows: Tensor, gradient: Tensor) -> None:
        """Add `gradient` (*rows.shape, dim) to the gradients of the values' (0) or pre-values' (1) rows."""
        sums, table = self._current_pass().sums, self.tables[which]
        assert table is not None
        if sums[which] is None:
            sums[which] = torch.zeros_like(table, dtype=torch.promote_types(table.dtype, torch.float32))
        total = sums[which]
        assert total is not None
        total.index_add_(0, rows.flatten(), gradient.flatten(0, -2).to(total.dtype))

    def add_products(self, products: Products) -> None:
        """Keep what a fused lookup knows until the pass ends."""
        self._current_pass().products.append(products)

    def take(self, nodes: list[Any]) -> list[Tensor | None]:
        """The gradients of the pass that ends here, in the tables' dtype.

        Args:
            nodes: of the autograd graph, to which the gradients of values and pre-values go, or None.
        """
        ended = self._passes.pop(torch._C._current_graph_task_id(), _Pass())
        if not ended.products:
            return [
                None if total is None or table is None else total.to(table.dtype)
                for total, table in zip(ended.sums, self.tables, strict=True)
            ]
        from ultramem.ops.weighted_lookup.table_gradient import table_gradients  # needs Triton

        buffers = [_take_gradient(node) for node in nodes]
        return table_gradients(ended.products, self.tables, ended.sums, buffers)

    def forget_failed_passes(self) -> None:
        """Drop what backward passes left that never came to their end; call while none is under way."""
        if self._passes and torch._C._current_graph_task_id() == -1:
            self._passes.clear()

    def _current_pass(self) -> _Pass:
        self.backward_begun = True
        return self._passes.setdefault(torch._C._current_graph_task_id(), _Pass())

    def compute_tables(
        self, values: Tensor, pre_values: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Values and pre-values in `dtype`; a copy, with both of a row side by side, is made once after each change.

        Args:
            values: as given on construction.
            pre_values: likewise.
            dtype: to compute in.
        """
        if values.dtype == dtype:
            return values, pre_values
        tables = [values] if pre_values is None else [pre_values, values]
        described = [(table.data_ptr(), table._version) for table in tables]
        if self._copy is None or self._copy.dtype != dtype or self._copied != described:
            self._make_copy(tables, dtype)
            self._copied = described
        copies = self._copy_of(tables)
        return copies[-1], None if pre_values is None else copies[0]

    def _make_copy(self, tables: list[Tensor], dtype: torch.dtype) -> None:
        # In place where possible: a replayed CUDA graph reads from there.
        with torch.inference_mode(False), torch.no_grad():
            if self._copy is None or self._copy.dtype != dtype:
                width = sum(table.shape[1] for table in tables)
                self._copy = torch.empty(len(tables[0]), width, dtype=dtype, device=tables[0].device)
            for part, table in zip(self._copy_of(tables), tables, strict=True):
                part.copy_(table)

    def _copy_of(self, tables: list[Tensor]) -> tuple[Tensor, ...]:
        assert self._copy is not None
        return self._copy.split([table.shape[1] for table in tables], dim=1)

    def refresh(self) -> None:
        """Have the copy, if there is one, made anew: where the table changes unseen, as in a replayed CUDA graph."""
        self._copied = []
        values, pre_values = self.tables
        assert values is not None
        # A shard's whole has no memory between passes.
        if self._copy is not None and values.untyped_storage().size():
            self.compute_tables(values.detach(), None if pre_values is None else pre_values.detach(), self._copy.dtype)


def _forget_copies(*_: Any) -> None:
    for state in TableState._all.values():
        state._copied = []


# Fused optimisers change parameters without a trace in their version.
register_optimizer_step_post_hook(_forget_copies)


class _Share(torch.autograd.Function):
    """Its backward runs once all lookups' backwards ran, and hands over what they left."""

    @staticmethod
    def forward(ctx: Any, state: TableState, values: Tensor, pre_values: Tensor | None) -> Tensor:
        ctx.state = state
        ctx.set_materialize_grads(False)
        return torch.zeros(1, device=values.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nodes = [node for node, _ in ctx.next_functions]
        return (None, *ctx.state.take([*nodes, None][:2]))


def _take_gradient(node: Any) -> Tensor | None:
    """Take the gradient that a parameter has already, if what is returned for it would be added to that.

    So micro-batches add to one buffer, without another one of the table's size and a pass over both.
    """
    parameter = getattr(node, "variable", None)
    if parameter is None or parameter.grad is None or parameter._backward_hooks:
        return None
    try:
        accumulates: bool = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # what is asked for is the gradient itself
        return None
    if not accumulates:
        return None
    gradient: Tensor = parameter.grad
    parameter.grad = None
    return gradient


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, table: Tensor, rows: Tensor, state: TableState, which: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.state, ctx.which = state, which
        return F.embedding(rows, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        (rows,) = ctx.saved_tensors
        ctx.state.add_rows(ctx.which, rows, gradient)
        return None, None, None, None, None
