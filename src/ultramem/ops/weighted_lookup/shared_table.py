"""One gradient accumulation for a table that many lookups of one pass read.

Ordinary autograd would give each lookup a gradient as large as the table and add them up. Here the lookups add
their rows' gradients to one float32 buffer, which becomes the table's gradient once the last of them is done.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class SharedTable:
    """A table of shape (rows, dim) whose gradient is accumulated over all lookups made through this object.

    Args:
        table: the table; a leaf such as a parameter, or the result of operations.
    """

    def __init__(self, table: Tensor) -> None:
        self.source = table
        self._storage = table.data_ptr()
        self._gradient = _TableGradient(table)
        # Empty: it only tells autograd that the lookups depend on the table.
        self._link: Tensor = _Share.apply(table, self._gradient)

    def is_open_for(self, table: Tensor) -> bool:
        """Whether further lookups of `table` can join: same memory, and no backward pass has begun."""
        return not self._gradient.begun and self.source is table and self._storage == table.data_ptr()

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (*rows.shape, dim) of the table."""
        return _Gather.apply(self._link, self.source.detach(), rows, self._gradient)


class _TableGradient:
    """The sum of the gradients of a table's rows over one backward pass, in float32 or wider."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.begun = False
        self._sum: Tensor | None = None

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        """Add `gradient` (*rows.shape, dim) to the rows' gradients."""
        self.begun = True
        if self._sum is None:
            dtype = torch.promote_types(self.table.dtype, torch.float32)
            self._sum = torch.zeros_like(self.table, dtype=dtype)
        self._sum.index_add_(0, rows.flatten(), gradient.flatten(0, -2).to(self._sum.dtype))

    def take(self) -> Tensor | None:
        """The gradient, in the table's dtype; a further backward pass starts from zero."""
        total, self._sum = self._sum, None
        return None if total is None else total.to(self.table.dtype)


class _Share(torch.autograd.Function):
    """Its backward runs once all lookups' backwards ran, and hands over what they accumulated."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, gradient: _TableGradient) -> Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return table.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, None]:
        return ctx.gradient.take(), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, table: Tensor, rows: Tensor, gradient: _TableGradient) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.gradient = gradient
        return F.embedding(rows, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        (rows,) = ctx.saved_tensors
        ctx.gradient.add(rows, gradient)
        return None, None, None, None
