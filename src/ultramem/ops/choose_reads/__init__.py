"""The rows that tokens read, found in a grid that was made ready before."""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem.ops.backend import HAS_KERNELS, can_run_kernels, takes_kernels
from ultramem.ops.choose_reads import naive
from ultramem.ops.choose_reads.grid import Grid, GridSizes

if HAS_KERNELS:
    from ultramem.ops.choose_reads import fused


def choose_reads(queries: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """The table rows of each token's best cells, for few tokens and without gradients.

    It is `tucker_topk` or `product_key_topk`, with the queries' norm before and the way from cells to rows after it.

    Args:
        queries: (tokens, num_queries, key_dim), of the keys' dtype, last stride 1.
        grid: keys, and how cells are scored.

    Returns:
        rows (tokens, heads * k), int64; scores (tokens, heads * k, cores), in float32 or wider; virtual copies
        (tokens, heads * k), int64, or None. The reads of a head come in any order.

    Raises:
        UltraMemError: the backend is `fused`, and there are no kernels for these arguments.
    """
    if takes_kernels("choose_reads", HAS_KERNELS and fused.supports(queries, grid)):
        return fused.choose_reads(queries, grid)
    return naive.choose_reads(queries, grid)


def is_fast(x: Tensor, dtype: torch.dtype, sizes: GridSizes) -> bool:
    """Whether there are kernels for such a search in `dtype` on the device of x, or none at all."""
    return not can_run_kernels(x) or fused.takes_sizes(dtype, sizes)
