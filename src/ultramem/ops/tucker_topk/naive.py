"""Tucker-decomposed retrieval in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def tucker_topk(
    queries: Tensor, keys: Tensor, cores: Tensor, u: Tensor, t: Tensor, k: int, axis_k: int
) -> tuple[Tensor, Tensor]:
    """The definition; arguments and result as in `ultramem.ops.tucker_topk.tucker_topk`."""
    row_scores, column_scores = axis_scores(queries, keys)
    return best_cells(row_scores, column_scores, cores, u, t, k, axis_k)


def axis_scores(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column scores, (tokens, heads, rank, keys) each; arguments as in `tucker_topk`."""
    tokens = queries.shape[0]
    if torch.compiler.is_compiling() and queries.device.type == "cpu" and tokens == 1:
        # Of a single token inductor makes a reduction that writes beyond its result's end (pytorch/pytorch#196681).
        queries = queries.expand(2, -1, -1, -1)
    return torch.einsum("txrd,hxnrd->xthrn", queries, keys)[:, :tokens].unbind(0)  # type: ignore[return-value]


def best_cells(
    row_scores: Tensor, column_scores: Tensor, cores: Tensor, u: Tensor, t: Tensor, k: int, axis_k: int
) -> tuple[Tensor, Tensor]:
    """`tucker_topk` from row and column scores, (tokens, heads, rank, keys) each; by descending sum."""
    keys = row_scores.shape[-1]
    with torch.no_grad():
        rows = (row_scores * u.unsqueeze(-1)).sum(-2).topk(axis_k).indices
        columns = (column_scores * t.unsqueeze(-1)).sum(-2).topk(axis_k).indices
        summed_cores = cores.sum(0, dtype=row_scores.dtype)
        weighted_rows = torch.einsum("thri,hrs->this", _at(row_scores, rows), summed_cores)
        cells = (weighted_rows @ _at(column_scores, columns)).flatten(-2).topk(k).indices
        chosen_rows = rows.gather(-1, cells // axis_k)
        chosen_columns = columns.gather(-1, cells % axis_k)
    wide = torch.promote_types(row_scores.dtype, torch.float32)
    with torch.autocast(row_scores.device.type, enabled=False):
        scores = torch.einsum(
            "thrk,chrs,thsk->thkc",
            _at(row_scores, chosen_rows).to(wide),
            cores.to(wide),
            _at(column_scores, chosen_columns).to(wide),
        )
    return scores, chosen_rows * keys + chosen_columns


def _at(scores: Tensor, indices: Tensor) -> Tensor:
    """Scores (tokens, heads, rank, keys) at indices (tokens, heads, k), as (tokens, heads, rank, k)."""
    return scores.gather(-1, indices.unsqueeze(-2).expand(*scores.shape[:-1], indices.shape[-1]))
