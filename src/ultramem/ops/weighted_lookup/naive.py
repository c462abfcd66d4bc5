"""Weighted sums of table rows in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem.ops.weighted_lookup.shared_table import SharedTable

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda x: x, "gelu": F.gelu, "silu": F.silu}


def weighted_lookup(
    scores: Tensor,
    rows: Tensor,
    table: SharedTable,
    pre_input: Tensor | None = None,
    *,
    pre_activation: str | None = None,
    blocks: Tensor | None = None,
    num_blocks: int = 1,
) -> Tensor:
    """Each token's sum of its rows' values, weighted by its scores and its products with the pre-values.

    UltraMem (arXiv:2411.12364), section 3.2 (MCS), UltraMemV2 (arXiv:2508.18756), section 3: core c weighs the
    c-th slice of the value; the pre-value product, through `pre_activation`, weighs all of it.

    Args:
        scores: (tokens, k, cores).
        rows: (tokens, k), int64, row numbers of the table.
        table: values (table_rows, value_dim), where value_dim is a multiple of the number of cores, and with
            `pre_input` pre-values (table_rows, pre_value_dim). It collects the gradients of several lookups.
        pre_input: (tokens, pre_value_dim), or None for a lookup without pre-values.
        pre_activation: None, `gelu` or `silu`.
        blocks: (tokens, k), int64, each row's virtual block; None sums all rows together.
        num_blocks: number of virtual blocks, with `blocks`.

    Returns:
        (tokens, value_dim), or with `blocks` (tokens, num_blocks * value_dim), the blocks' sums side by side.
    """
    cores = scores.shape[-1]
    if pre_input is not None:
        products = torch.einsum("tp,tkp->tk", pre_input, table.gather_pre_values(rows).to(pre_input.dtype))
        scores = scores * ACTIVATIONS[pre_activation](products).unsqueeze(-1)
    chosen = table.gather_values(rows)
    weights = scores.unsqueeze(2)
    if blocks is not None:
        places = blocks[..., None, None].expand(-1, -1, -1, cores)
        weights = scores.new_zeros(*blocks.shape, num_blocks, cores).scatter(2, places, weights)
    # Each core weighs the whole value, of which its slice is kept: all slices in one product, nothing rearranged.
    sums = weights.flatten(2).transpose(1, 2).to(chosen.dtype) @ chosen
    slices = sums.unflatten(1, (-1, cores)).unflatten(-1, (cores, -1))
    return slices.diagonal(dim1=2, dim2=3).transpose(-1, -2).flatten(1)
