"""What all memory layers share: query, retrieval, lookup, output, and what is counted on the way."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem.config import MemoryConfig
from ultramem.layers.usage import Usage
from ultramem.layers.value_table import ValueTable


class MemoryLayer(nn.Module):
    """One memory layer: a few rows of a large table, chosen and weighted by each token.

    Subclasses retrieve: they set the parameters of the scores and define `retrieve`.

    Args:
        config: sizes and switches.
        d_model: width of input and output.
        table: the rows to read. A table that other layers read too belongs to no layer: `owns_table=False`.
        axis_keys: keys on each axis.
        window_start: table row at which this layer's window starts; it wraps around the table's end.
        window_rows: rows of the window.
        num_queries: query vectors of a token.
        owns_table: whether the table's parameters belong to this layer.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        auxiliary_loss: scalar of the last forward pass in training, weighted and ready to be added to the loss,
            or None if the configuration asks for none. A mean over the tokens.
        usage: what the forward passes read, while `track_usage` is on.
    """

    query_conv: nn.Conv1d | None

    def __init__(
        self,
        config: MemoryConfig,
        d_model: int,
        table: ValueTable,
        *,
        axis_keys: int,
        window_start: int,
        window_rows: int,
        num_queries: int,
        owns_table: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.axis_keys = axis_keys
        # A tensor, and on the CPU: a compiler makes one program for layers that differ in it, and nothing waits for it.
        self.window_start = torch.tensor(window_start, device="cpu")
        self.window_rows = window_rows
        self.num_queries = num_queries
        self.auxiliary_loss: Tensor | None = None
        self.usage: Usage | None = None
        if owns_table:
            self.table = table
        else:
            # Not a submodule: the table's parameters would be listed once for every layer.
            object.__setattr__(self, "table", table)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        query_width = num_queries * config.key_dim
        self.query_proj = nn.Linear(d_model, query_width, bias=False, **factory)
        if config.query_conv:
            self.query_conv = nn.Conv1d(
                query_width, query_width, config.query_conv, groups=query_width, bias=False, **factory
            )
        else:
            self.query_conv = None

    def forward(self, x: Tensor) -> Tensor:
        """Read the memory.

        Args:
            x: (..., d_model), the block's normalised feed-forward input; with a query convolution
                (..., sequence, d_model).

        Returns:
            (..., d_model), to be added to the residual stream.
        """
        self.auxiliary_loss = None
        scores, indices = self.retrieve(self.queries(x))
        flat = x.reshape(-1, self.d_model)
        rows, blocks = self.locate(indices)
        output = self.project(self.lookup(flat, scores, rows, blocks), flat)
        if self.usage is not None:
            self.usage.record((rows - self.window_start) % self.table.values.shape[0], scores, output)
        if self.config.output_dropout:
            output = F.dropout(output, self.config.output_dropout, self.training)
        return output.view(x.shape)

    def queries(self, x: Tensor) -> Tensor:
        """Queries (tokens, num_queries, key_dim) of x (..., d_model), not yet normalised."""
        queries = self.query_proj(x)
        if self.query_conv is not None:
            sequences = queries.reshape(math.prod(x.shape[:-2]), *queries.shape[-2:]).transpose(1, 2)
            padded = F.pad(sequences, (self.config.query_conv, 0))  # one more than needed, lest a sequence be empty
            queries = self.query_conv(padded)[..., 1:].transpose(1, 2)
        return queries.reshape(-1, self.num_queries, self.config.key_dim)

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (tokens, heads * top_k, cores) and virtual indices (tokens, heads * top_k) of the chosen rows."""
        raise NotImplementedError

    def locate(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Table rows of retrieved indices, and their virtual blocks if those are kept apart."""
        return indices, None

    def lookup(self, x: Tensor, scores: Tensor, rows: Tensor, blocks: Tensor | None) -> Tensor:
        """Weighted sums (tokens, output_width) of the rows; x is (tokens, d_model)."""
        return self.table.lookup(scores, rows)

    def project(self, looked_up: Tensor, x: Tensor) -> Tensor:
        """From what was looked up, (tokens, output_width), to (tokens, d_model); x is (tokens, d_model)."""
        raise NotImplementedError

    def track_usage(self, enabled: bool = True) -> None:
        """Start or stop counting what forward passes read; see `Usage`."""
        self.usage = Usage(self.window_rows, self.table.values.device) if enabled else None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "auxiliary_loss": None}  # it has a graph, which cannot be copied

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        c = self.config
        return f"heads={c.heads}, top_k={c.top_k}, axis_keys={self.axis_keys}, window_rows={self.window_rows}"


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x over its root mean square, times the gain; in the dtype of x also under autocast, which would widen it."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], None if gain is None else gain.to(x.dtype), eps)
