"""The base class of PKM and Memory+: scores are sums of a row and a column score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ultramem.layers.balance import balance_loss
from ultramem.layers.initial_values import SIMULATED_TOKENS, HostScheme
from ultramem.layers.memory_layer import MemoryLayer
from ultramem.ops.product_key_topk import product_key_topk
from ultramem.ops.product_key_topk.naive import axis_scores
from ultramem.ops.product_key_topk.naive import product_key_topk as product_key_topk_by_definition
from ultramem.tables.filling import fill
from ultramem.tables.table import Table

if TYPE_CHECKING:
    from ultramem.config import MemoryConfig

_NO_TUCKER = "has no Tucker scores"
_NO_COPIES = "has no virtual copies"
_NO_PRE_VALUES = "has no pre-values"
_NO_POOL = "does not pool its layers' tables"


class ProductKeyLayer(MemoryLayer):
    """A softmax over the top k sums of a row and a column score, and a weighted sum of values.

    Each head has its own queries and keys. Arguments as in `MemoryLayer`.
    """

    defaults = {"value_lr": 1e-3}
    unused = {
        "axis_top_k": "searches the whole grid exactly",
        "tucker_rank": _NO_TUCKER,
        "cores": _NO_TUCKER,
        "query_per_rank": _NO_TUCKER,
        "tucker_penalty_coef": _NO_TUCKER,
        "tucker_penalty_threshold": _NO_TUCKER,
        "pre_value_dim": _NO_PRE_VALUES,
        "pre_activation": _NO_PRE_VALUES,
        "key_expansion": _NO_COPIES,
        "value_projectors": _NO_COPIES,
        "share_ratio": _NO_POOL,
        "sharing": _NO_POOL,
        "value_lr_multiplier": "trains its values at a constant rate, value_lr",
        "value_lr_decay": "trains its values at a constant rate, value_lr",
    }

    def __init__(self, config: MemoryConfig, d_model: int, table: Table, **options: Any) -> None:
        super().__init__(config, d_model, table, **options)
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.keys = nn.Parameter(torch.empty(config.heads, 2, self.axis_keys, config.key_dim, **factory))

    @classmethod
    def queries_per_token(cls, config: MemoryConfig) -> int:
        """As in `MemoryLayer`."""
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

    def init_retrieval(self, scheme: HostScheme, generator: torch.Generator) -> float:
        """As in `MemoryLayer`."""
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
        shape = 2, self.axis_keys, config.key_dim
        keys = torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
        scores, _ = product_key_topk_by_definition(
            queries.transpose(0, 1).unsqueeze(1), keys.unsqueeze(0), config.top_k
        )
        return float(scores.softmax(-1).square().sum(-1).mean())
