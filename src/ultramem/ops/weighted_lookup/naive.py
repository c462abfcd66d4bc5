"""Weighted sums of table rows in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem.ops.weighted_lookup.reads import Reads

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda x: x, "gelu": F.gelu, "silu": F.silu}


def weighted_lookup(reads: Reads, values: Tensor, pre_values: Tensor | None = None) -> Tensor:
    """As `ultramem.ops.weighted_lookup.weighted_lookup`, whose definition this is."""
    if reads.pre_input is None:
        return weighted_sum(reads, F.embedding(reads.rows, values))
    assert pre_values is not None
    return weighted_sum(reads, F.embedding(reads.rows, values), F.embedding(reads.rows, pre_values))


def weighted_sum(reads: Reads, values: Tensor, pre_values: Tensor | None = None) -> Tensor:
    """The lookup's sums (tokens, virtual copies * value_dim), in the values' dtype, of rows that were gathered already.

    The rows' values are (tokens, k, value_dim); with `reads.pre_input`, their pre-values (tokens, k, pre_value_dim).
    """
    scores, cores = reads.scores, reads.scores.shape[-1]
    if reads.pre_input is not None:
        assert pre_values is not None
        products = torch.einsum("tp,tkp->tk", reads.pre_input, pre_values.to(reads.pre_input.dtype))
        scores = scores * ACTIVATIONS[reads.pre_activation](products).unsqueeze(-1)
    weights = scores.unsqueeze(2)
    if reads.virtual_copies is not None:
        places = reads.virtual_copies[..., None, None].expand(-1, -1, -1, cores)
        weights = scores.new_zeros(*reads.rows.shape, reads.num_virtual_copies, cores).scatter(2, places, weights)
    # Each core weighs the whole value, of which its slice is kept: all slices in one product, nothing rearranged.
    sums = weights.flatten(2).transpose(1, 2).to(values.dtype) @ values
    slices = sums.unflatten(1, (-1, cores)).unflatten(-1, (cores, -1))
    return slices.diagonal(dim1=2, dim2=3).transpose(-1, -2).flatten(1)
