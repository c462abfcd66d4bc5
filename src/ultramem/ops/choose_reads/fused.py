"""Choosing reads with two Triton kernels: the scores of all keys, then the choice.

Few tokens do not fill a GPU, and their time is that of starting kernels and of waiting for memory: hence few kernels,
many programs for the keys, and several warps for a choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem.ops.backend import KERNEL_DTYPES, can_run_kernels
from ultramem.ops.choose_reads.axis_scores import axis_scores
from ultramem.ops.choose_reads.grid import Grid, GridSizes
from ultramem.ops.choose_reads.selection import MOST_CANDIDATES, select_reads

_MAX_KEYS = 8192
_MAX_RANK = 4


def supports(queries: Tensor, grid: Grid) -> bool:
    """Whether there are kernels for these arguments."""
    return can_run_kernels(queries) and takes_sizes(queries.dtype, grid.sizes)


def takes_sizes(dtype: torch.dtype, sizes: GridSizes) -> bool:
    """Whether there are kernels for such a search."""
    return (
        dtype in KERNEL_DTYPES
        and sizes.num_keys <= _MAX_KEYS
        and max(sizes.k, sizes.axis_k) <= MOST_CANDIDATES
        and sizes.rank <= _MAX_RANK
    )


def choose_reads(queries: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the definition in `naive.py`. Scores are float32."""
    return select_reads(axis_scores(queries, grid), grid)
