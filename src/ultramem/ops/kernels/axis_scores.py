"""The scores of all keys of an axis: one batched matrix product, its gradients, and the padding that makes it fast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem.ops.kernels.sizes import ceil_div


def pad_keys(keys: Tensor) -> Tensor:
    """Keys (..., keys, key_dim) with zeros up to a multiple of 64, which fast matrix products need."""
    count = keys.shape[-2]
    return F.pad(keys, (0, 0, 0, ceil_div(count, 64) * 64 - count))


def axis_scores(queries: Tensor, padded: Tensor) -> Tensor:
    """Scores (batch, tokens, heads, padded keys) by one batched product.

    Args:
        queries: (batch, tokens, key_dim).
        padded: keys, (batch, heads, padded keys, key_dim), same dtype.
    """
    return torch.bmm(queries, padded.flatten(1, 2).transpose(1, 2)).unflatten(-1, padded.shape[1:3])


def axis_scores_backward(
    gradients: Tensor, queries: Tensor, padded: Tensor, query_gradients: Tensor, key_gradients: Tensor
) -> None:
    """Write the gradients of the queries and of the padded keys; shapes as in `axis_scores`."""
    flat = gradients.flatten(2)
    torch.bmm(flat, padded.flatten(1, 2), out=query_gradients)
    torch.bmm(flat.transpose(1, 2), queries, out=key_gradients.flatten(1, 2))
