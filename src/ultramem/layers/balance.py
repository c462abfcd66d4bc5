"""The loss that balances the use of keys."""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(axis_scores: Tensor, axis_top_k: int) -> Tensor:
    """Load-balancing loss of the keys on an axis: `keys * sum_i f_i P_i`, 1 for a uniform choice.

    f_i is the share of choices that are key i, P_i its mean softmax probability. This is the loss of mixture-of-experts
    routers (Switch Transformer, arXiv:2101.03961, equation 4), applied to keys. As each head has its own keys, it is
    averaged over heads.

    Args:
        axis_scores: (tokens, heads, keys), scores of the keys.
        axis_top_k: number of keys chosen on this axis.

    Returns:
        a scalar, in float32 or wider.
    """
    tokens, heads, keys = axis_scores.shape
    wide = axis_scores.to(torch.promote_types(axis_scores.dtype, torch.float32))
    chosen = axis_scores.detach().topk(min(axis_top_k, keys)).indices.transpose(0, 1).flatten(1)
    counts = wide.new_zeros(heads, keys).scatter_add_(1, chosen, wide.new_ones(()).expand_as(chosen))
    share = counts / max(chosen.shape[1], 1)
    probability = wide.softmax(-1).sum(0) / max(tokens, 1)
    return keys * (share * probability).sum(1).mean()
