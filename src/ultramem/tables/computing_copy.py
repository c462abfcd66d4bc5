"""A copy of a table in the dtype that is computed in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ultramem.tables.torch_internals import after_each_step, describe_contents


class ComputingCopy:
    """Values and pre-values in a narrower dtype, both of a row side by side; made once after each change of the table.

    Changes in place are seen by themselves, and so are steps of PyTorch's optimizers; after others call `refresh`.
    """

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._copied: list[tuple[int, int]] = []  # contents of the tables when they were copied
        self._fresh_after_step = False

    def in_dtype(self, values: Tensor, pre_values: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Values and pre-values (rows, dim), of one table at every call, to compute with in `dtype`.

        They are the table's own if `dtype` holds all of its numbers, else the copy.
        """
        self._fresh_after_step = False
        if torch.promote_types(values.dtype, dtype) == dtype:
            return values, pre_values
        tables = [values] if pre_values is None else [pre_values, values]
        described = [describe_contents(table) for table in tables]
        if self._copy is None or self._copy.dtype != dtype or self._copied != described:
            self._make(tables, dtype)
            self._copied = described
        copies = self._parts(tables)
        return copies[-1], None if pre_values is None else copies[0]

    def parts(self, values: Tensor, pre_values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The copies of values and pre-values, for an optimizer to write to together with the table; None without."""
        tables = [values] if pre_values is None else [pre_values, values]
        if self._copy is None or self._copied != [describe_contents(table) for table in tables]:
            return None, None
        copies = self._parts(tables)
        return copies[-1], None if pre_values is None else copies[0]

    def written(self, values: Tensor, pre_values: Tensor | None) -> None:
        """Take note that an optimizer has written the copy together with the table, unseen by PyTorch."""
        for table in (values, pre_values):
            if table is not None:
                increment_version(table)
        self._copied = [describe_contents(table) for table in (pre_values, values) if table is not None]
        self._fresh_after_step = True

    def refresh(self, values: Tensor, pre_values: Tensor | None) -> None:
        """Make the copy anew, if there is one: where the table changes unseen, as in a replayed CUDA graph."""
        if self._fresh_after_step:
            return
        self._copied = []
        # A shard's whole has no memory between passes.
        if self._copy is not None and values.untyped_storage().size():
            self.in_dtype(values.detach(), None if pre_values is None else pre_values.detach(), self._copy.dtype)

    def _make(self, tables: list[Tensor], dtype: torch.dtype) -> None:
        if self._copy is None:
            # Fused optimizers change parameters without a trace in their version.
            after_each_step(self, ComputingCopy._forget)
        # In place where possible: a replayed CUDA graph reads from there.
        with torch.inference_mode(False), torch.no_grad():
            if self._copy is None or self._copy.dtype != dtype:
                width = sum(table.shape[1] for table in tables)
                self._copy = torch.empty(len(tables[0]), width, dtype=dtype, device=tables[0].device)
            for part, table in zip(self._parts(tables), tables, strict=True):
                part.copy_(table)

    def _forget(self, _: object) -> None:
        if not self._fresh_after_step:
            self._copied = []

    def _parts(self, tables: list[Tensor]) -> tuple[Tensor, ...]:
        assert self._copy is not None
        return self._copy.split([table.shape[1] for table in tables], dim=1)
