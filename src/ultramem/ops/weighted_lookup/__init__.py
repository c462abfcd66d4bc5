"""Weighted sums of rows of a large table."""

from ultramem.ops.backend import Operation
from ultramem.ops.weighted_lookup import naive
from ultramem.ops.weighted_lookup.shared_table import SharedTable

__all__ = ["SharedTable", "weighted_lookup"]

weighted_lookup = Operation(naive.weighted_lookup)
