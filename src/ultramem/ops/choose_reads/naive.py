"""Choosing reads in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem.ops.choose_reads.grid import Grid
from ultramem.ops.product_key_topk.naive import best_sums
from ultramem.ops.tucker_topk.naive import best_cells


def choose_reads(queries: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition; arguments and result as in `ultramem.ops.choose_reads.choose_reads`."""
    axes = axis_scores(queries, grid)
    if grid.cores is None:
        rows, columns = axes.squeeze(3).unbind()
        sums, cells = best_sums(rows, columns, grid.sizes.k)
        scores = sums.softmax(-1).unsqueeze(-1)
    else:
        assert grid.u is not None
        assert grid.t is not None
        scores, cells = best_cells(axes, grid.cores, grid.u, grid.t, grid.sizes.k, grid.sizes.axis_k)
    return locate(cells.flatten(1), scores.flatten(1, 2), grid)


def axis_scores(queries: Tensor, grid: Grid) -> Tensor:
    """Row and column scores, (2, tokens, heads, rank, num_keys)."""
    if grid.norm_eps is not None:
        queries = F.rms_norm(queries, queries.shape[-1:], eps=grid.norm_eps)
    tokens, _, key_dim = queries.shape
    axis, rank, head = (step * key_dim for step in grid.query_steps)
    shape = tokens, 2, grid.sizes.rank, grid.sizes.heads, key_dim
    of_cells = queries.contiguous().as_strided(shape, (queries.shape[1] * key_dim, axis, rank, head, 1))
    return torch.einsum("txrhd,xrhnd->xthrn", of_cells, grid.keys)[..., : grid.sizes.num_keys]


def locate(cells: Tensor, scores: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows, scores and virtual copies of chosen cells (tokens, reads)."""
    virtual = cells if grid.shuffle is None else grid.shuffle[cells]
    rows = virtual % grid.window_rows + grid.window_start
    rows = torch.where(rows < grid.table_rows, rows, rows - grid.table_rows)
    return rows, scores, virtual // grid.window_rows if grid.separate_copies else None
