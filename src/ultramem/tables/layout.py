"""Which rows of which table a model's memory layers can reach."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TableLayout:
    """The tables of a model, and each memory layer's window of one.

    Attributes:
        table_rows: rows of one table.
        window_keys: square root of `window_rows`.
        axis_keys: keys on each of a layer's two axes, `key_expansion * window_keys`.
        starts: for each layer, the table row at which its window starts.
        shared: whether all layers read one table, rather than one each.
    """

    table_rows: int
    window_keys: int
    axis_keys: int
    starts: tuple[int, ...]
    shared: bool

    @property
    def num_tables(self) -> int:
        """Tables in the model."""
        return min(len(self.starts), 1) if self.shared else len(self.starts)

    @property
    def window_rows(self) -> int:
        """Table rows that one layer can reach."""
        return self.window_keys**2


def whole_tables(num_keys: int, num_layers: int, *, key_expansion: int = 1, shared: bool) -> TableLayout:
    """Tables of `num_keys` squared rows, one for each layer or one for all; a layer reaches all of its table."""
    return TableLayout(num_keys**2, num_keys, key_expansion * num_keys, (0,) * num_layers, shared)


def pooled_table(num_keys: int, num_layers: int, key_expansion: int, share_ratio: float, sharing: str) -> TableLayout:
    """One table of which each layer contributes `num_keys` squared rows, and reaches a window.

    UltraMemV2 (arXiv:2508.18756). Arguments as the fields of `MemoryConfig`.
    """
    layer_rows = num_keys**2
    table_rows = layer_rows * num_layers
    window_keys = math.isqrt(math.floor(table_rows * share_ratio + 1e-6))

    def start(layer: int) -> int:
        own = layer * layer_rows
        if sharing == "ring":
            return own
        if sharing == "block":
            window_rows = max(window_keys, 1) ** 2
            own = own // window_rows * window_rows
        return min(own, table_rows - window_keys**2)

    starts = tuple(start(layer) for layer in range(num_layers))
    return TableLayout(table_rows, window_keys, key_expansion * window_keys, starts, shared=True)
