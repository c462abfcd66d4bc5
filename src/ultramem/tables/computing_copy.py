"""A copy of a table in the dtype that is computed in."""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem.tables.torch_internals import after_each_step, describe_contents


class ComputingCopy:
    """Values and pre-values in a narrower dtype, both of a row side by side; made once after each change of the table.

    Changes in place are seen by themselves, and so are steps of PyTorch's optimizers; after others call `refresh`.
    """

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._copied: list[tuple[int, int]] = []  # contents of the tables when they were copied

    def in_dtype(self, values: Tensor, pre_values: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Values and pre-values (rows, dim), of one table at every call, in `dtype`: if they have another, the copy."""
        if values.dtype == dtype:
            return values, pre_values
        tables = [values] if pre_values is None else [pre_values, values]
        described = [describe_contents(table) for table in tables]
        if self._copy is None or self._copy.dtype != dtype or self._copied != described:
            self._make(tables, dtype)
            self._copied = described
        copies = self._parts(tables)
        return copies[-1], None if pre_values is None else copies[0]

    def refresh(self, values: Tensor, pre_values: Tensor | None) -> None:
        """Make the copy anew, if there is one: where the table changes unseen, as in a replayed CUDA graph."""
        self._copied = []
        # A shard's whole has no memory between passes.
        if self._copy is not None and values.untyped_storage().size():
            self.in_dtype(values.detach(), None if pre_values is None else pre_values.detach(), self._copy.dtype)

    def _make(self, tables: list[Tensor], dtype: torch.dtype) -> None:
        if self._copy is None:
            # Fused optimizers change parameters without a trace in their version.
            after_each_step(self, lambda copy, _: copy._copied.clear())
        # In place where possible: a replayed CUDA graph reads from there.
        with torch.inference_mode(False), torch.no_grad():
            if self._copy is None or self._copy.dtype != dtype:
                width = sum(table.shape[1] for table in tables)
                self._copy = torch.empty(len(tables[0]), width, dtype=dtype, device=tables[0].device)
            for part, table in zip(self._parts(tables), tables, strict=True):
                part.copy_(table)

    def _parts(self, tables: list[Tensor]) -> tuple[Tensor, ...]:
        assert self._copy is not None
        return self._copy.split([table.shape[1] for table in tables], dim=1)
