"""UltraMem: Tucker scores, an output projection for each virtual copy, a table for each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultramem.layers.tucker import TuckerMemory
from ultramem.tables.layout import TableLayout, whole_tables

if TYPE_CHECKING:
    from ultramem.config import MemoryConfig


class UltraMem(TuckerMemory):
    """UltraMem (arXiv:2411.12364). Arguments as in `MemoryLayer`."""

    defaults = {"key_expansion": 2, "value_projectors": "per_block"}
    unused = dict.fromkeys(("share_ratio", "sharing"), "does not pool its layers' tables")
    published_gain_exponent = -0.33

    @classmethod
    def layout(cls, config: MemoryConfig, num_layers: int) -> TableLayout:
        assert config.key_expansion is not None
        return whole_tables(config.num_keys, num_layers, key_expansion=config.key_expansion, shared=False)
