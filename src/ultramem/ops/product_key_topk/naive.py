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
    row_keys, column_keys = row_scores.shape[-1], column_scores.shape[-1]
    ranks = torch.tensor(_candidate_pairs(k, row_keys, column_keys), device=row_scores.device)
    best_rows, rows = row_scores.topk(min(k, row_keys))
    best_columns, columns = column_scores.topk(min(k, column_keys))
    sums = best_rows.index_select(-1, ranks[0]) + best_columns.index_select(-1, ranks[1])
    scores, chosen = sums.topk(k)
    row_ranks, column_ranks = ranks[:, chosen]
    return scores, rows.gather(-1, row_ranks) * column_keys + columns.gather(-1, column_ranks)
