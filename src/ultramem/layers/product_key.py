"""Memory layers whose scores are sums of a row and a column score: PKM and Memory+."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem.config import MemoryConfig
from ultramem.errors import ConfigError
from ultramem.layers.memory_layer import MemoryLayer, rms_norm
from ultramem.layers.value_table import ValueTable
from ultramem.ops.product_key_topk import product_key_topk
from ultramem.ops.product_key_topk.naive import axis_scores


class ProductKeyMemory(MemoryLayer):
    """Product-Key Memory (arXiv:1907.05242): a softmax over the top k sums, and a weighted sum of values.

    Each head has its own query and keys. Arguments as for `MemoryLayer`.

    Raises:
        ConfigError: `value_dim` differs from `d_model`; there is no projection between them.
    """

    def __init__(self, config: MemoryConfig, d_model: int, table: ValueTable, **options: Any) -> None:
        super().__init__(config, d_model, table, num_queries=config.heads * 2, **options)
        if config.kind == "pkm" and config.value_dim != d_model:
            raise ConfigError(
                f"value_dim={config.value_dim}: pkm adds values to the residual stream, so set it to d_model={d_model}"
            )
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.keys = nn.Parameter(torch.empty(config.heads, 2, self.axis_keys, config.key_dim, **factory))

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """As in `MemoryLayer`; the weights are a softmax over each head's chosen sums."""
        config = self.config
        per_axis = queries.view(-1, config.heads, 2, config.key_dim)
        scores, indices = product_key_topk(per_axis, self.keys, config.top_k)
        if config.balance_coef and self.training:
            losses = [balance_loss(axis, config.top_k) for axis in axis_scores(per_axis, self.keys)]
            self.auxiliary_loss = config.balance_coef * torch.stack(losses).sum()
        return scores.softmax(-1).flatten(1).unsqueeze(-1), indices.flatten(1)

    def project(self, looked_up: Tensor, x: Tensor) -> Tensor:
        """Nothing: values are as wide as the model."""
        return looked_up


class MemoryPlus(ProductKeyMemory):
    """Memory+ (arXiv:2412.09764): normalised queries, a SiLU gate from the input, an output projection.

    Queries are RMS-normalised, keys are not, as in the published code. Arguments as for `MemoryLayer`.
    """

    def __init__(self, config: MemoryConfig, d_model: int, table: ValueTable, **options: Any) -> None:
        super().__init__(config, d_model, table, **options)
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.query_norm = nn.RMSNorm(config.key_dim, eps=config.norm_eps, **factory)
        self.gate_proj = nn.Linear(d_model, config.value_dim, bias=False, **factory)
        self.output_proj = nn.Linear(config.value_dim, d_model, bias=False, **factory)

    def queries(self, x: Tensor) -> Tensor:
        """Normalised queries (tokens, num_queries, key_dim)."""
        return rms_norm(super().queries(x), self.query_norm.weight, self.config.norm_eps)

    def project(self, looked_up: Tensor, x: Tensor) -> Tensor:
        """Gate and project."""
        return self.output_proj(looked_up * F.silu(self.gate_proj(x)))


def balance_loss(axis_scores: Tensor, axis_top_k: int) -> Tensor:
    """How unevenly an axis' keys are chosen: the keys' number times the sum of choice share times mean softmax.

    The load-balancing loss of mixture-of-experts routers (Switch Transformer, arXiv:2101.03961, equation 4), applied
    to keys; 1 for a uniform choice. Heads have keys of their own: the mean over heads.

    Args:
        axis_scores: (tokens, heads, keys).
        axis_top_k: keys chosen on this axis.

    Returns:
        Scalar, in float32 or wider.
    """
    tokens, heads, keys = axis_scores.shape
    wide = axis_scores.to(torch.promote_types(axis_scores.dtype, torch.float32))
    chosen = axis_scores.detach().topk(min(axis_top_k, keys)).indices.transpose(0, 1).flatten(1)
    counts = wide.new_zeros(heads, keys).scatter_add_(1, chosen, wide.new_ones(()).expand_as(chosen))
    share = counts / max(chosen.shape[1], 1)
    probability = wide.softmax(-1).sum(0) / max(tokens, 1)
    return keys * (share * probability).sum(1).mean()
