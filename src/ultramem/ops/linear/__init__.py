"""Linear maps of few tokens, whose time is that of reading the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem.ops.backend import HAS_KERNELS, takes_kernels
from ultramem.ops.kernels.operators import seen_by_compilers
from ultramem.ops.linear import naive

if HAS_KERNELS:
    from ultramem.ops.linear import fused

MOST_TOKENS = 64  # beyond, torch is as fast


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, (tokens, width), without a gradient.

    Args:
        x: (tokens, d), any floating-point dtype.
        weight: (width, d), same dtype.

    Raises:
        UltraMemError: the backend is `fused`, and there is no kernel for the arguments.
    """
    if x.shape[0] > MOST_TOKENS or not takes_kernels("linear", HAS_KERNELS and fused.supports(x, weight)):
        return naive.linear(x, weight)
    result: Tensor = _operator(x, weight) if seen_by_compilers(x) else fused.linear(x, weight)
    return result


def _run(x: Tensor, weight: Tensor) -> Tensor:
    return fused.linear(x, weight)


_operator = torch.library.custom_op("ultramem::linear", _run, mutates_args=())


@_operator.register_fake
def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
