"""Product-key retrieval in plain PyTorch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def _candidate_pairs(k: int, row_keys: int, column_keys: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ranks (i, j) of the sorted axes that can be among the best k sums: those with (i+1)(j+1) <= k."""
    pairs = [(i, j) for i in range(min(k, row_keys)) for j in range(min(k // (i + 1), column_keys))]
    rows, columns = zip(*pairs, strict=True)
    return rows, columns


def product_key_topk(row_scores: Tensor, column_scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best sums `row_scores[..., i] + column_scores[..., j]` over the whole grid, exactly.

    Product-Key Memory (arXiv:1907.05242), section 3.2.

    Args:
        row_scores: (..., row_keys), any floating-point dtype.
        column_scores: (..., column_keys), same dtype.
        k: sums to keep, at most `row_keys * column_keys`.

    Returns:
        Scores (..., k) in descending order, differentiable, and int64 indices (..., k), `i * column_keys + j`.
        Equal scores come in any order.
    """
    column_keys = column_scores.shape[-1]
    ranks = _candidate_pairs(k, row_scores.shape[-1], column_keys)
    row_ranks, column_ranks = torch.tensor(ranks, device=row_scores.device).unbind(0)
    best_rows, row_indices = row_scores.topk(int(row_ranks[-1]) + 1, dim=-1)
    best_columns, column_indices = column_scores.topk(min(k, column_keys), dim=-1)
    sums = best_rows[..., row_ranks] + best_columns[..., column_ranks]
    scores, chosen = sums.topk(k, dim=-1)
    indices = row_indices[..., row_ranks] * column_keys + column_indices[..., column_ranks]
    return scores, indices.gather(-1, chosen)
