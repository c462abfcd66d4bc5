"""Filling parameters with values, sharded or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a parameter with normal values of mean 0."""
    fill(parameter, lambda full: full.normal_(0, std, generator=generator))


def fill(parameter: Tensor, draw: Callable[[Tensor], object]) -> None:
    """Fill a parameter; if it is sharded, every process draws the whole and keeps its shard.

    Values are drawn in float32 or wider, and then rounded: the same numbers in every dtype.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if not isinstance(parameter, DTensor) and parameter.dtype == dtype:
        draw(parameter)
        return
    full = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
    draw(full)
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    # Every process drew the same values, so nothing is sent.
    shards = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(shards.to_local())
