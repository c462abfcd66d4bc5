"""The loss that balances the use of keys."""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(axis_scores: Tensor, axis_top_k: int) -> Tensor:
    """How unevenly an axis' keys are chosen: the keys' number times the sum of choice share times mean softmax.

    The load-balancing loss of mixture-of-experts routers (Switch Transformer, arXiv:2101.03961, equation 4), applied
    to keys; 1 for a uniform choice. Heads have keys of their own: the mean over heads.

    Args:
        axis_scores: (tokens, heads, keys).
        axis_top_k: keys chosen on this axis.

    Returns:
        scalar, in float32 or wider.
    """
    tokens, heads, keys = axis_scores.shape
    wide = axis_scores.to(torch.promote_types(axis_scores.dtype, torch.float32))
    chosen = axis_scores.detach().topk(min(axis_top_k, keys)).indices.transpose(0, 1).flatten(1)
    counts = wide.new_zeros(heads, keys).scatter_add_(1, chosen, wide.new_ones(()).expand_as(chosen))
    share = counts / max(chosen.shape[1], 1)
    probability = wide.softmax(-1).sum(0) / max(tokens, 1)
    return keys * (share * probability).sum(1).mean()
