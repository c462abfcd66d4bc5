"""Weighted sums of rows of a large table."""

from ultramem.ops.backend import HAS_KERNELS, Operation
from ultramem.ops.weighted_lookup import naive
from ultramem.ops.weighted_lookup.shared_table import SharedTable

__all__ = ["SharedTable", "weighted_lookup"]

weighted_lookup = Operation(naive.weighted_lookup)

if HAS_KERNELS:
    from ultramem.ops.weighted_lookup import fused

    weighted_lookup.register_fused(fused.weighted_lookup, fused.supports)
