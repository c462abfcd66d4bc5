"""PKM: product keys only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ultramem.errors import ConfigError
from ultramem.layers.initial_values import HostScheme
from ultramem.layers.product_key import ProductKeyLayer
from ultramem.tables.filling import normal
from ultramem.tables.layout import TableLayout, whole_tables

if TYPE_CHECKING:
    from ultramem.config import MemoryConfig


class ProductKeyMemory(ProductKeyLayer):
    """Product-Key Memory (arXiv:1907.05242): values are added to the residual stream directly.

    Each layer has its own table. Arguments as in `MemoryLayer`.
    """

    unused = {**ProductKeyLayer.unused, "norm_eps": "normalises neither queries nor keys"}

    @classmethod
    def check(cls, config: MemoryConfig, d_model: int | None = None) -> None:
        """As in `MemoryLayer`: there is no projection between `value_dim` and `d_model`."""
        if d_model is not None and config.value_dim != d_model:
            raise ConfigError(
                f"value_dim={config.value_dim}: must be d_model={d_model}, as pkm adds values to the residual stream"
            )

    @classmethod
    def layout(cls, config: MemoryConfig, num_layers: int) -> TableLayout:
        return whole_tables(config.num_keys, num_layers, shared=False)

    def project(self, looked_up: Tensor, x: Tensor) -> Tensor:
        return looked_up

    def init_output(self, scheme: HostScheme, generator: torch.Generator) -> float:
        return 0.0 if self.config.init == "zero_output" else scheme.feed_forward_std

    def init_published(self, generator: torch.Generator) -> None:
        normal(self.query_proj.weight, self.d_model**-0.5, generator)
        self.init_keys(generator)

    def query_std(self, scheme: HostScheme) -> float:
        return scheme.linear_std * math.sqrt(self.d_model)
