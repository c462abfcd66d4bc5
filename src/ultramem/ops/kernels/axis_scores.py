"""The scores of all keys of an axis: one batched matrix product, its gradients, and the padding that makes it fast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_keys(keys: Tensor) -> Tensor:
    """Keys (..., keys, key_dim) with zeros up to a multiple of 64, which fast matrix products need."""
    return F.pad(keys, (0, 0, 0, -keys.shape[-2] % 64))


def axis_scores(queries: Tensor, padded: Tensor) -> Tensor:
    """Scores (a * b, tokens, heads, padded keys) by one batched product.

    Args:
        queries: (tokens, a, b, key_dim).
        padded: keys, (a * b, heads, padded keys, key_dim), same dtype.
    """
    return torch.bmm(_batch(queries), padded.flatten(1, 2).transpose(1, 2)).unflatten(-1, padded.shape[1:3])


def axis_scores_backward(
    gradients: Tensor, queries: Tensor, padded: Tensor, query_gradients: Tensor, key_gradients: Tensor
) -> None:
    """Write the gradients of the queries and of the padded keys; shapes as in `axis_scores`."""
    flat = gradients.flatten(2)
    torch.bmm(flat, padded.flatten(1, 2), out=_batch(query_gradients))
    torch.bmm(flat.transpose(1, 2), _batch(queries), out=key_gradients.flatten(1, 2))


def _batch(queries: Tensor) -> Tensor:
    """Queries as (a * b, tokens, key_dim); a view if they are contiguous."""
    return queries.permute(1, 2, 0, 3).flatten(0, 1)
