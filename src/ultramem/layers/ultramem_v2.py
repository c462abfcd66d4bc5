"""UltraMemV2: Tucker scores with a query for each rank, one output projection, a table with a window for each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultramem.layers.tucker import TuckerMemory
from ultramem.tables.layout import TableLayout, pooled_table

if TYPE_CHECKING:
    from ultramem.config import MemoryConfig


class UltraMemV2(TuckerMemory):
    """UltraMemV2 (arXiv:2508.18756); with `pre_activation` PEER (arXiv:2407.04153). Arguments as in `MemoryLayer`."""

    defaults = {"query_per_rank": True}
    published_gain_exponent = -0.4

    @classmethod
    def layout(cls, config: MemoryConfig, num_layers: int) -> TableLayout:
        assert config.key_expansion is not None
        return pooled_table(config.num_keys, num_layers, config.key_expansion, config.share_ratio, config.sharing)
