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


def product_key_topk(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The definition; arguments and result as in `ultramem.ops.product_key_topk.product_key_topk`."""
    row_scores, column_scores = axis_scores(queries, keys)
    return best_sums(row_scores, column_scores, k)


def axis_scores(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column scores, (tokens, heads, keys) each; arguments as in `product_key_topk`."""
    return torch.einsum("thxd,hxnd->xthn", queries, keys).unbind(0)  # type: ignore[return-value]


def best_sums(row_scores: Tensor, column_scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`product_key_topk` from row scores (..., row_keys) and column scores (..., column_keys); in descending order."""
    row_keys, column_keys = row_scores.shape[-1], column_scores.shape[-1]
    wide = torch.promote_types(row_scores.dtype, torch.float32)
    ranks = torch.tensor(_candidate_pairs(k, row_keys, column_keys), device=row_scores.device)
    best_rows, rows = row_scores.to(wide).topk(min(k, row_keys))
    best_columns, columns = column_scores.to(wide).topk(min(k, column_keys))
    sums = best_rows.index_select(-1, ranks[0]) + best_columns.index_select(-1, ranks[1])
    scores, chosen = sums.topk(k)
    row_ranks, column_ranks = ranks[:, chosen]
    return scores, rows.gather(-1, row_ranks) * column_keys + columns.gather(-1, column_ranks)
