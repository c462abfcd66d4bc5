"""The best k sums of a row score and a column score."""

from __future__ import annotations

from torch import Tensor

from ultramem.ops.backend import HAS_KERNELS, takes_kernels
from ultramem.ops.product_key_topk import naive

if HAS_KERNELS:
    from ultramem.ops.product_key_topk import fused


def product_key_topk(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best sums of a row score and a column score over the whole grid, exactly.

    Product-Key Memory (arXiv:1907.05242), section 3.2. A key's score is its product with the query.

    Args:
        queries: (tokens, heads, 2, key_dim), row and column queries, any floating-point dtype.
        keys: (heads, 2, keys, key_dim), row and column keys, same dtype.
        k: sums to keep, at most `keys ** 2`.

    Returns:
        scores (tokens, heads, k), in float32 or wider, differentiable, and int64 indices (tokens, heads, k),
        `i * keys + j`. The sums come in any order, and equal ones are chosen among in any way.

    Raises:
        UltraMemError: the backend is `fused`, and there are no kernels for these arguments.
    """
    if takes_kernels("product_key_topk", HAS_KERNELS and fused.supports(queries, keys, k)):
        return fused.product_key_topk(queries, keys, k)
    return naive.product_key_topk(queries, keys, k)
