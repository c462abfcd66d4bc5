"""The best k cells of a grid of Tucker-decomposed scores."""

from __future__ import annotations

from torch import Tensor

from ultramem.ops.backend import HAS_KERNELS, takes_kernels
from ultramem.ops.tucker_topk import naive

if HAS_KERNELS:
    from ultramem.ops.tucker_topk import fused


def tucker_topk(
    queries: Tensor, keys: Tensor, cores: Tensor, u: Tensor, t: Tensor, k: int, axis_k: int
) -> tuple[Tensor, Tensor]:
    """The k best grid cells `sum_c row[i]ᵀ C_c column[j]` among the best `axis_k` keys of each axis.

    UltraMem (arXiv:2411.12364), section 3.1 (TDQKR): a key's score in each rank is its product with the query. Each
    axis is ranked by the cores' rank-1 approximation, `row · u` and `column · t`; the grid of the candidates is scored
    exactly.

    Args:
        queries: (tokens, 2, rank, key_dim), row and column queries, any floating-point dtype.
        keys: (heads, 2, keys, rank, key_dim), row and column keys, same dtype.
        cores: (cores, heads, rank, rank).
        u: (heads, rank), leading left singular vector of each head's summed cores; no gradient flows to it.
        t: (heads, rank), leading right singular vector; no gradient flows to it.
        k: cells to keep, at most `axis_k ** 2`.
        axis_k: candidates of each axis, at most `keys`.

    Returns:
        scores (tokens, heads, k, cores), in float32 or wider, differentiable in queries, keys and cores; int64 indices
        (tokens, heads, k), `i * keys + j`. The cells come in any order, and equal sums are chosen among in any way.

    Raises:
        UltraMemError: the backend is `fused`, and there are no kernels for these arguments.
    """
    if takes_kernels("tucker_topk", HAS_KERNELS and fused.supports(queries, keys, cores, u, t, k, axis_k)):
        return fused.tucker_topk(queries, keys, cores, u, t, k, axis_k)
    return naive.tucker_topk(queries, keys, cores, u, t, k, axis_k)
