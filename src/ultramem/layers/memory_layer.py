"""What all memory layers share: query, retrieval, lookup and output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem.layers import decoding
from ultramem.layers.decoding import Fold, Folded
from ultramem.layers.initial_values import HostScheme, table_std
from ultramem.ops.choose_reads.grid import GridSizes
from ultramem.ops.kernels.operators import register
from ultramem.ops.weighted_lookup.reads import Reads
from ultramem.tables.filling import fill, normal
from ultramem.tables.layout import TableLayout
from ultramem.tables.table import Table

if TYPE_CHECKING:
    from ultramem.config import MemoryConfig

_PUBLISHED_VALUE_STD = 0.02


class ReadObserver(Protocol):
    """Observes the reads of a layer's forward passes, compiled or not. It must not wait for a GPU."""

    def observe(self, layer: MemoryLayer, reads: Reads, output: Tensor) -> None:
        """Observe a forward pass: its reads, and its output (tokens, d_model) before dropout."""


class MemoryLayer(nn.Module):
    """A memory layer: each token chooses a few rows of a large table and weights them.

    Each kind of memory is a subclass. It sets `defaults` and `unused`, creates the parameters of its scores, defines
    the methods that raise `NotImplementedError` here, and overrides others where it differs.

    Args:
        config: sizes and options.
        d_model: width of input and output.
        table: table to read.
        layout: the model's tables and windows; the parameters of a shared table do not belong to the layer.
        number: of this layer, from 0.
        device, dtype: of the parameters.

    Attributes:
        auxiliary_loss: weighted auxiliary loss of the last training forward pass, to be added to the loss: a scalar,
            the mean over tokens. None if the configuration has no such loss.
        observers: observers of each forward pass.
    """

    # The kind's defaults of `MemoryConfig` fields that are left at None; a kind replaces those that differ.
    defaults: ClassVar[Mapping[str, Any]] = {"query_per_rank": False, "key_expansion": 1, "value_projectors": "single"}
    # Fields that the kind does not use, and why, as a sentence that follows its name.
    unused: ClassVar[Mapping[str, str]] = {}

    query_conv: nn.Conv1d | None

    def __init__(
        self,
        config: MemoryConfig,
        d_model: int,
        table: Table,
        *,
        layout: TableLayout,
        number: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.axis_keys, self.window_rows = layout.axis_keys, layout.window_rows
        # A tensor, so that a compiler makes one program for all layers; on the CPU, so that nothing waits for it.
        self.window_start = torch.tensor(layout.starts[number], device="cpu")
        self.num_queries = self.queries_per_token(config)
        self.auxiliary_loss: Tensor | None = None
        self.observers: list[ReadObserver] = []
        if layout.shared:  # not a submodule: the table's parameters would be listed once for every layer
            object.__setattr__(self, "table", table)
        else:
            self.table = table
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = self.num_queries * config.key_dim
        self.query_proj = nn.Linear(d_model, width, bias=False, **factory)
        self.query_conv = None
        if config.query_conv:
            self.query_conv = nn.Conv1d(width, width, config.query_conv, groups=width, bias=False, **factory)
        self._make_helpers()

    def _make_helpers(self) -> None:
        self.folded = Fold()
        self.number = register(self)  # by which an operator finds the layer

    @classmethod
    def check(cls, config: MemoryConfig, d_model: int | None = None) -> None:
        """Check the rules of this kind for a configuration whose single fields are checked, and the model's width.

        Raises:
            ConfigError: a value is invalid.
        """

    @classmethod
    def queries_per_token(cls, config: MemoryConfig) -> int:
        """Number of query vectors per token."""
        raise NotImplementedError

    @classmethod
    def count_parameters(cls, config: MemoryConfig, d_model: int, axis_keys: int) -> int:
        """Number of a layer's parameters without its table, by arithmetic. A kind adds those that it creates."""
        return cls.queries_per_token(config) * config.key_dim * (d_model + config.query_conv)

    @classmethod
    def layout(cls, config: MemoryConfig, num_layers: int) -> TableLayout:
        """The tables and windows of a model with `num_layers` memory layers."""
        raise NotImplementedError

    @classmethod
    def refresh_all(cls, layers: Sequence[MemoryLayer]) -> None:
        """Recompute what is derived from the parameters of a model's layers; called after each optimizer step."""

    def forward(self, x: Tensor) -> Tensor:
        """Read the memory: the output (..., d_model), to be added to the residual stream.

        Args:
            x: (..., d_model), normalised feed-forward input of the block; with a query convolution
                (..., sequence, d_model).
        """
        self.auxiliary_loss = None
        flat = x.reshape(-1, self.d_model)
        if decoding.decodes(self, flat):
            reads = decoding.choose(self, flat)
        else:
            scores, indices = self.retrieve(self.queries(x))
            reads = self.locate(indices, scores, flat)
        output = self.project(self.table.lookup(reads, flat.dtype), flat)
        for observer in self.observers:
            observer.observe(self, reads, output)
        if self.config.output_dropout:
            output = F.dropout(output, self.config.output_dropout, self.training)
        return output.view(x.shape)

    def queries(self, x: Tensor) -> Tensor:
        """Queries (tokens, num_queries, key_dim) of x (..., d_model), before normalisation."""
        queries = self.query_proj(x)
        if self.query_conv is not None:
            sequences = queries.reshape(math.prod(x.shape[:-2]), *queries.shape[-2:]).transpose(1, 2)
            padded = F.pad(sequences, (self.config.query_conv, 0))  # one more than needed, as a sequence may be empty
            queries = self.query_conv(padded)[..., 1:].transpose(1, 2)
        return queries.reshape(-1, self.num_queries, self.config.key_dim)

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (tokens, heads * top_k, cores) and virtual indices (tokens, heads * top_k) of the chosen rows."""
        raise NotImplementedError

    def locate(self, indices: Tensor, scores: Tensor, x: Tensor) -> Reads:
        """Reads of the table for the results of `retrieve` and x (tokens, d_model)."""
        return Reads(self.table_rows(indices), scores)

    def table_rows(self, in_window: Tensor) -> Tensor:
        """Row numbers in the table of row numbers in the window, which may wrap around at the end of the table."""
        rows = in_window + self.window_start
        return torch.where(rows < self.table.rows, rows, rows - self.table.rows)

    def project(self, looked_up: Tensor, x: Tensor) -> Tensor:
        """Map the lookup's result (tokens, output_width) to (tokens, d_model); x is (tokens, d_model)."""
        raise NotImplementedError

    @property
    def grid_sizes(self) -> GridSizes | None:
        """Of the search in decoding; None if the kind cannot be folded."""
        return None

    @property
    def score_cores(self) -> int:
        """Scores of a read."""
        return 1

    def joined_projections(self) -> list[nn.Linear]:
        """What projects the input to queries and to the input of the pre-values; decoding joins them."""
        return [self.query_proj]

    def folded_parameters(self) -> list[Tensor]:
        """The parameters that `fold` computes from."""
        return [projection.weight for projection in self.joined_projections()]

    def fold(self, dtype: torch.dtype) -> Folded:
        """What decoding needs of the parameters, in `dtype`, in memory of its own; for kinds with `grid_sizes`."""
        raise NotImplementedError

    def fold_projections(self, dtype: torch.dtype) -> Tensor:
        """The joined projections' weights (width, d_model)."""
        return torch.cat([projection.weight.to(dtype) for projection in self.joined_projections()])

    @property
    def active_parameters(self) -> int:
        """Number of parameters that a token uses: the layer's own, and the table rows that it reads."""
        own = sum(parameter.numel() for parameter in {*self.parameters()} - {*self.table.parameters()})
        return own + self.numbers_read

    @property
    def numbers_read(self) -> int:
        """How many numbers of the table a token reads."""
        return self.config.heads * self.config.top_k * (self.table.value_dim + self.table.pre_value_dim)

    def metrics(self) -> dict[str, Tensor]:
        """Scalars about the layer's parameters, for `Memory.usage_metrics`."""
        return {}

    def init_weights(self, scheme: HostScheme, generator: torch.Generator) -> float:
        """Initialise all but the table as `config.init` says; return the standard deviation of the table's values."""
        if self.query_conv is not None:  # start as the identity
            fill(self.query_conv.weight, lambda full: full.zero_()[..., -1].fill_(1.0))
        if self.config.init == "published":
            self.init_published(generator)
            return _PUBLISHED_VALUE_STD
        normal(self.query_proj.weight, scheme.linear_std, generator)
        squared_weights = self.init_retrieval(scheme, generator)
        sum_std = self.init_output(scheme, generator)
        return table_std(self.config, self.d_model, scheme.linear_std, sum_std / math.sqrt(squared_weights))

    def init_retrieval(self, scheme: HostScheme, generator: torch.Generator) -> float:
        """Initialise what chooses and weights rows; return the mean sum of a token's squared weights."""
        raise NotImplementedError

    def init_output(self, scheme: HostScheme, generator: torch.Generator) -> float:
        """Initialise what follows the lookup.

        Returns the standard deviation of a token's weighted sum for which the layer's output has the feed-forward's.
        """
        raise NotImplementedError

    def init_projection(self, weight: Tensor, scheme: HostScheme, generator: torch.Generator) -> float:
        """`init_output` for a layer that ends in an output projection."""
        normal(weight, 0.0 if self.config.init == "zero_output" else scheme.output_std, generator)
        return scheme.feed_forward_std / (scheme.output_std * math.sqrt(self.config.value_dim))

    def init_published(self, generator: torch.Generator) -> None:
        """Initialise all but the table with the constants of the published code."""
        raise NotImplementedError

    def check_loaded(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Check what decides which rows are read in a state from a file; kernels rely on it.

        Args:
            state: a state with this layer's parameters and buffers; some may be missing or on `meta`.
            prefix: with which their names begin.

        Raises:
            UltraMemError: indices are out of range or repeated, or a direction is not finite.
        """

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        self.check_loaded(state_dict, prefix)
        self.folded.forget()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryLayer:
        super()._apply(fn, recurse)
        self.folded.forget()
        return self

    def __getstate__(self) -> dict[str, object]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("folded", "number")}
        return {**kept, "auxiliary_loss": None}  # it has a graph, which cannot be copied

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._make_helpers()

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        c = self.config
        return f"heads={c.heads}, top_k={c.top_k}, axis_keys={self.axis_keys}, window_rows={self.window_rows}"


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x over its root mean square, times the gain, in the dtype of x, which autocast would widen."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], None if gain is None else gain.to(x.dtype), eps)


def balance_loss(axis_scores: Tensor, axis_top_k: int) -> Tensor:
    """Loss that balances the use of an axis' keys, `keys * sum_i f_i P_i`, 1 for a uniform choice; float32 or wider.

    f_i is the share of choices that are key i, P_i its mean softmax probability. This is the loss of mixture-of-experts
    routers (Switch Transformer, arXiv:2101.03961, equation 4), applied to keys. As each head has its own keys, it is
    averaged over heads.

    Args:
        axis_scores: (tokens, heads, keys), of which each token chooses `axis_top_k`.
    """
    tokens, heads, keys = axis_scores.shape
    wide = axis_scores.to(torch.promote_types(axis_scores.dtype, torch.float32))
    chosen = axis_scores.detach().topk(min(axis_top_k, keys)).indices.transpose(0, 1).flatten(1)
    counts = wide.new_zeros(heads, keys).scatter_add_(1, chosen, wide.new_ones(()).expand_as(chosen))
    share = counts / max(chosen.shape[1], 1)
    probability = wide.softmax(-1).sum(0) / max(tokens, 1)
    return keys * (share * probability).sum(1).mean()
