"""One gradient accumulation for a table that many lookups of one pass read.

Ordinary autograd would give each lookup a gradient as large as the table and add them up. Here the lookups add
their rows' gradients to one float32 buffer, which becomes the table's gradient once the last of them is done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SharedTable:
    """A table of shape (rows, dim) whose gradient is accumulated over all lookups made through this object."""

    def __init__(self, table: Tensor) -> None:
        self.source = table
        self._gradient: Tensor | None = None
        self._storage = table.data_ptr()
        self._data: Tensor | None = _Share.apply(table, self)

    def is_open_for(self, table: Tensor) -> bool:
        """Whether further lookups of `table` can join: same memory, and no backward pass has used this yet."""
        return (
            self._data is not None
            and self.source is table
            and self._storage == table.data_ptr()
            and self._data.requires_grad == (table.requires_grad and torch.is_grad_enabled())
        )

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (*rows.shape, dim) of the table."""
        return _Gather.apply(self._data, rows, self)

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        """Add `gradient` (*rows.shape, dim) to the rows' gradients."""
        if self._gradient is None:
            dtype = torch.promote_types(self.source.dtype, torch.float32)
            self._gradient = torch.zeros_like(self.source, dtype=dtype)
        self._gradient.index_add_(0, rows.flatten(), gradient.flatten(0, -2).to(self._gradient.dtype))

    def take_gradient(self) -> Tensor | None:
        """The gradient so far, in the table's dtype; lookups made from now on need a new object."""
        gradient, self._gradient = self._gradient, None
        self._data = None  # or it, its graph and this object would keep each other alive
        return None if gradient is None else gradient.to(self.source.dtype)


class _Share(torch.autograd.Function):
    """Identity; its backward runs once all lookups' backwards ran, and hands over what they accumulated."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, shared: SharedTable) -> Tensor:
        ctx.shared = shared
        ctx.set_materialize_grads(False)
        return table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        return ctx.shared.take_gradient(), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, shared: SharedTable) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shared = shared
        return table[rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (rows,) = ctx.saved_tensors
        ctx.shared.add(rows, gradient)
        return None, None, None
