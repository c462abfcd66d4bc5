"""What a memory layer asks of a table, wherever its rows live."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ultramem.ops.weighted_lookup.naive import weighted_sum
from ultramem.ops.weighted_lookup.reads import Reads


class Table(nn.Module):
    """Rows that memory layers look up; one table may serve many layers. Reads go in, weighted sums come out.

    A table in another form is a subclass that defines `gather`, `init_weights` and `device`; and `lookup`, where it can
    do better than to gather rows and sum them.

    It has `rows` rows, of a value of width `value_dim` and a pre-value of `pre_value_dim`, or 0 without pre-values.
    """

    def __init__(self, rows: int, value_dim: int, pre_value_dim: int = 0) -> None:
        super().__init__()
        self.rows, self.value_dim, self.pre_value_dim = rows, value_dim, pre_value_dim

    @property
    def device(self) -> torch.device:
        """Where reads must be."""
        raise NotImplementedError

    def lookup(self, reads: Reads, dtype: torch.dtype | None = None) -> Tensor:
        """Weighted sums of rows, (tokens, virtual copies * value_dim); see `ultramem.ops.weighted_lookup`.

        Args:
            reads: which rows, and what weighs them.
            dtype: to compute in and to return, without autocast; by default that of the rows.
        """
        values, pre_values = self.gather(reads.rows, pre_values=reads.pre_input is not None, dtype=dtype)
        return weighted_sum(reads, values, pre_values)

    def gather(
        self, rows: Tensor, *, pre_values: bool, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Values (*rows.shape, value_dim) of rows, and their pre-values if these are asked for, else None.

        Args:
            rows: numbers of rows, int64.
            pre_values: whether to gather pre-values too.
            dtype: of the result; by default the table's own.
        """
        raise NotImplementedError

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        """Fill the rows with normal values of mean 0, the same whether sharded or not."""
        raise NotImplementedError

    def begin_pass(self) -> None:
        """Get ready for a forward pass; only hosts that compile their layers one by one need to call it."""

    def refresh(self) -> None:
        """Follow parameters that have changed with what is derived from them; called after each optimizer step."""

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        return f"rows={self.rows}, value_dim={self.value_dim}, pre_value_dim={self.pre_value_dim}"
