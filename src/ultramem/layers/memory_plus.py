"""Memory+: product keys, one table for all layers, a gate and a projection."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem.layers import decoding
from ultramem.layers.initial_values import HostScheme, second_moment
from ultramem.layers.memory_layer import rms_norm
from ultramem.layers.product_key import ProductKeyLayer
from ultramem.tables.filling import normal
from ultramem.tables.layout import TableLayout, whole_tables
from ultramem.tables.table import Table

if TYPE_CHECKING:
    from ultramem.config import MemoryConfig


class MemoryPlus(ProductKeyLayer):
    """Memory+ (arXiv:2412.09764): normalised queries, a SiLU gate from the input, an output projection.

    Queries are RMS-normalised and keys are not, as in the published code. All layers share one table. Arguments as in
    `MemoryLayer`.
    """

    def __init__(self, config: MemoryConfig, d_model: int, table: Table, **options: Any) -> None:
        super().__init__(config, d_model, table, **options)
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.query_norm = nn.RMSNorm(config.key_dim, eps=config.norm_eps, **factory)
        self.gate_proj = nn.Linear(d_model, config.value_dim, bias=False, **factory)
        self.output_proj = nn.Linear(config.value_dim, d_model, bias=False, **factory)

    @classmethod
    def count_parameters(cls, config: MemoryConfig, d_model: int, axis_keys: int) -> int:
        """As in `MemoryLayer`."""
        own = config.key_dim + 2 * d_model * config.value_dim
        return super().count_parameters(config, d_model, axis_keys) + own

    @classmethod
    def layout(cls, config: MemoryConfig, num_layers: int) -> TableLayout:
        return whole_tables(config.num_keys, num_layers, shared=True)

    def queries(self, x: Tensor) -> Tensor:
        """Normalised queries (tokens, num_queries, key_dim)."""
        return rms_norm(super().queries(x), self.query_norm.weight, self.config.norm_eps)

    def folded_parameters(self) -> list[Tensor]:
        return [*super().folded_parameters(), self.query_norm.weight]

    def query_gain(self) -> tuple[Tensor | None, float | None]:
        """As in `ProductKeyLayer`."""
        return self.query_norm.weight, self.config.norm_eps

    def project(self, looked_up: Tensor, x: Tensor) -> Tensor:
        """As in `MemoryLayer`: gate and project."""
        return decoding.apply(self.output_proj, looked_up * F.silu(decoding.apply(self.gate_proj, x)))

    def init_keys(self, generator: torch.Generator) -> None:
        """As in `ProductKeyLayer`, with the queries' gains."""
        super().init_keys(generator)
        nn.init.ones_(self.query_norm.weight)

    def init_output(self, scheme: HostScheme, generator: torch.Generator) -> float:
        normal(self.gate_proj.weight, scheme.linear_std, generator)
        gate = second_moment(F.silu, scheme.linear_std * math.sqrt(self.d_model))
        return self.init_projection(self.output_proj.weight, scheme, generator) / math.sqrt(gate)

    def init_published(self, generator: torch.Generator) -> None:
        normal(self.query_proj.weight, self.d_model**-0.5, generator)
        self.init_keys(generator)
        normal(self.gate_proj.weight, self.d_model**-0.5, generator)
        normal(self.output_proj.weight, self.config.value_dim**-0.5, generator)

    def query_std(self, scheme: HostScheme) -> float:
        return 1.0
