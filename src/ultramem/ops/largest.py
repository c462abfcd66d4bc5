"""The places of the largest numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem.ops.backend import runs_now_on_cpu

try:  # most have it, but PyTorch does not need it
    import numpy as np

    _SORTS_VECTORS = int(np.__version__.partition(".")[0]) >= 2
except ImportError:
    _SORTS_VECTORS = False


def largest(scores: Tensor, k: int) -> Tensor:
    """Indices (..., k), int64, of the k largest of scores (..., n), in any order; ties are broken in any way.

    On a CPU, NumPy sorts lines of numbers with vector instructions, several times as fast as PyTorch selects from them:
    the k-th largest is known first, and what reaches it is found then.
    """
    sorts = _SORTS_VECTORS and scores.dtype in (torch.float32, torch.float64)
    if sorts and runs_now_on_cpu(scores) and scores.numel():
        return _reaching_bounds(scores.detach().flatten(0, -2), k).view(*scores.shape[:-1], k)
    return scores.topk(k, sorted=False).indices


def _reaching_bounds(scores: Tensor, k: int) -> Tensor:
    lines, n = scores.shape
    bounds = torch.from_numpy(np.sort(scores.numpy(), axis=1)[:, n - k, None])
    reaching = scores >= bounds
    places = torch.from_numpy(np.flatnonzero(reaching.numpy()))
    starts = torch.arange(0, lines * n, n).unsqueeze(1)
    if len(places) == lines * k:
        places = places.view(lines, k) - starts
        low, high = places.aminmax()
        if low >= 0 and high < n:  # each line has its k places
            return places
    # Several numbers are equal to a bound, or a bound is not a number.
    other = reaching.sum(1) != k
    chosen = scores[other].topk(k, sorted=False).indices
    reaching[other] = reaching.new_zeros(len(chosen), n).scatter(1, chosen, True)
    return torch.from_numpy(np.flatnonzero(reaching.numpy())).view(lines, k) - starts
