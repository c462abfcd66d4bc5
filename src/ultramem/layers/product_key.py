"""The base class of PKM and Memory+: scores are sums of a row and a column score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ultramem.layers.decoding import Folded
from ultramem.layers.initial_values import SIMULATED_TOKENS, HostScheme
from ultramem.layers.memory_layer import MemoryLayer, balance_loss
from ultramem.ops.choose_reads.grid import Grid, GridSizes
from ultramem.ops.kernels.axis_scores import pad_keys
from ultramem.ops.product_key_topk import product_key_topk
from ultramem.ops.product_key_topk.naive import axis_scores
from ultramem.ops.product_key_topk.naive import product_key_topk as product_key_topk_by_definition
from ultramem.tables.filling import fill
from ultramem.tables.table import Table

if TYPE_CHECKING:
    from ultramem.config import MemoryConfig

_TUCKER_FIELDS = "tucker_rank", "cores", "query_per_rank", "tucker_penalty_coef", "tucker_penalty_threshold"


class ProductKeyLayer(MemoryLayer):
    """A softmax over the top k sums of a row and a column score, and a weighted sum of values.

    Each head has its own queries and keys. Arguments as in `MemoryLayer`.
    """

    defaults = {"value_lr": 1e-3}
    unused = {
        "axis_top_k": "searches the whole grid exactly",
        **dict.fromkeys(_TUCKER_FIELDS, "has no Tucker scores"),
        **dict.fromkeys(("pre_value_dim", "pre_activation"), "has no pre-values"),
        **dict.fromkeys(("key_expansion", "value_projectors"), "has no virtual copies"),
        **dict.fromkeys(("share_ratio", "sharing"), "does not pool its layers' tables"),
        **dict.fromkeys(("value_lr_multiplier", "value_lr_decay"), "trains its values at a constant rate, value_lr"),
    }

    def __init__(self, config: MemoryConfig, d_model: int, table: Table, **options: Any) -> None:
        super().__init__(config, d_model, table, **options)
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.keys = nn.Parameter(torch.empty(config.heads, 2, self.axis_keys, config.key_dim, **factory))

    @classmethod
    def queries_per_token(cls, config: MemoryConfig) -> int:
        return config.heads * 2

    @classmethod
    def count_parameters(cls, config: MemoryConfig, d_model: int, axis_keys: int) -> int:
        """As in `MemoryLayer`."""
        return super().count_parameters(config, d_model, axis_keys) + config.heads * 2 * axis_keys * config.key_dim

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """As in `MemoryLayer`; the weights are a softmax over each head's chosen sums."""
        config = self.config
        per_axis = queries.view(-1, config.heads, 2, config.key_dim)
        scores, indices = product_key_topk(per_axis, self.keys, config.top_k)
        if config.balance_coef and self.training:
            losses = [balance_loss(axis, config.top_k) for axis in axis_scores(per_axis, self.keys)]
            self.auxiliary_loss = config.balance_coef * torch.stack(losses).sum()
        return scores.softmax(-1).flatten(1).unsqueeze(-1), indices.flatten(1)

    @property
    def grid_sizes(self) -> GridSizes:
        """As in `MemoryLayer`."""
        k, heads = self.config.top_k, self.config.heads
        return GridSizes(self.axis_keys, k, min(k, self.axis_keys), rank=1, heads=heads)

    def folded_parameters(self) -> list[Tensor]:
        return [*super().folded_parameters(), self.keys]

    def fold(self, dtype: torch.dtype) -> Folded:
        """As in `MemoryLayer`."""
        gain, eps = self.query_gain()
        keys = self.keys if gain is None else self.keys * gain
        grid = Grid(
            keys=pad_keys(keys.to(dtype).transpose(0, 1).unsqueeze(1)), sizes=self.grid_sizes,
            query_steps=(1, 0, 2), norm_eps=eps, cores=None, u=None, t=None, shuffle=None,
            window_start=int(self.window_start), window_rows=self.window_rows, table_rows=self.table.rows,
            separate_copies=False,
        )  # fmt: skip
        return Folded(self.fold_projections(dtype), grid)

    def query_gain(self) -> tuple[Tensor | None, float | None]:
        """The gain of the queries' norm and its epsilon; None for both without a norm."""
        return None, None

    def init_retrieval(self, scheme: HostScheme, generator: torch.Generator) -> float:
        self.init_keys(generator)
        return self.config.heads * self.simulate_weights(self.query_std(scheme))

    def init_keys(self, generator: torch.Generator) -> None:
        """As in PKM (arXiv:1907.05242) and Memory+: uniform, of variance 1 / (3 key_dim)."""
        bound = self.config.key_dim**-0.5
        fill(self.keys, lambda full: full.uniform_(-bound, bound, generator=generator))

    def query_std(self, scheme: HostScheme) -> float:
        """Initial standard deviation of a query's elements."""
        raise NotImplementedError

    def simulate_weights(self, query_std: float) -> float:
        """Sum of a head's squared weights, mean over random queries."""
        config, device = self.config, self.keys.device
        generator = torch.Generator(device).manual_seed(0)
        queries = torch.randn(2, SIMULATED_TOKENS, config.key_dim, generator=generator, device=device) * query_std
        bound = config.key_dim**-0.5
        keys = torch.empty(1, 2, self.axis_keys, config.key_dim, device=device)
        keys.uniform_(-bound, bound, generator=generator)
        scores, _ = product_key_topk_by_definition(queries.transpose(0, 1).unsqueeze(1), keys, config.top_k)
        return float(scores.softmax(-1).square().sum(-1).mean())
