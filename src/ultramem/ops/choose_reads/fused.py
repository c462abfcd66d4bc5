"""Choosing reads with Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem.ops.backend import can_run_kernels
from ultramem.ops.choose_reads.axis_scores import axis_scores
from ultramem.ops.choose_reads.grid import Grid, GridSizes
from ultramem.ops.choose_reads.naive import locate
from ultramem.ops.kernels.candidates import MAX_KEYS
from ultramem.ops.kernels.cells import best_cells

_MOST_CANDIDATES = 128
_MAX_RANK = 4


def supports(queries: Tensor, grid: Grid) -> bool:
    """Whether there are kernels for these arguments."""
    return can_run_kernels(queries) and takes_sizes(queries.dtype, grid.sizes)


def takes_sizes(dtype: torch.dtype, sizes: GridSizes) -> bool:
    """Whether there are kernels for such a search."""
    return (
        dtype in (torch.bfloat16, torch.float16, torch.float32)
        and sizes.num_keys <= MAX_KEYS
        and max(sizes.k, sizes.axis_k) <= _MOST_CANDIDATES
        and sizes.rank <= _MAX_RANK
    )


def choose_reads(queries: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the definition in `naive.py`. Scores are float32."""
    scores, sizes = axis_scores(queries, grid), grid.sizes
    cells = best_cells(scores.transpose(2, 3), sizes.num_keys, sizes.k, sizes.axis_k, grid.cores, grid.u, grid.t)
    weights = cells.scores.softmax(2) if grid.cores is None else cells.scores
    return locate(cells.indices.flatten(1), weights.flatten(1, 2), grid)
