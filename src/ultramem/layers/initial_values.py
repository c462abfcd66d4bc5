"""Initial values: matched to the feed-forward beside the memory, or as published.

`matched` follows UltraMemV2 (arXiv:2508.18756), appendix A: each memory layer's initial output has the standard
deviation of the output of the feed-forward beside it. Linear layers use the host's scheme, and norm gains make the mean
chosen score 1. The table's scale is computed from the host's scheme and a seeded simulation of the retrieval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem.ops.weighted_lookup.naive import ACTIVATIONS
from ultramem.tables.table import Table

if TYPE_CHECKING:
    from ultramem.config import MemoryConfig
    from ultramem.layers.memory_layer import MemoryLayer

SIMULATED_TOKENS = 512


@dataclass(frozen=True)
class HostScheme:
    """The host's initialisation of the block that a memory layer is in.

    Attributes:
        linear_std: standard deviation of the weights of linear layers that read the residual stream.
        output_std: standard deviation of the weights of linear layers that write to it.
        feed_forward_std: standard deviation of the feed-forward's output for inputs of variance 1.
    """

    linear_std: float
    output_std: float
    feed_forward_std: float

    @classmethod
    def swiglu(cls, d_model: int, hidden_size: int, linear_std: float, output_std: float) -> HostScheme:
        """The scheme of a block with a SwiGLU feed-forward of width `hidden_size` and normal weights."""
        hidden = linear_std**2 * d_model
        variance = hidden_size * second_moment(F.silu, math.sqrt(hidden)) * hidden * output_std**2
        return cls(linear_std, output_std, math.sqrt(variance))

    @classmethod
    def paper(cls, d_model: int, num_blocks: int) -> HostScheme:
        """The scheme of UltraMemV2: weights of variance 2 / (5 d), outputs scaled by 1 / sqrt(2 L)."""
        std = math.sqrt(2 / (5 * d_model))
        return cls.swiglu(d_model, 8 * d_model // 3, std, std / math.sqrt(2 * num_blocks))

    @classmethod
    @torch.no_grad()
    def measured(cls, feed_forward: nn.Module, d_model: int, linear_std: float, output_std: float) -> HostScheme:
        """The scheme of a block with any feed-forward, (1, tokens, d_model) to the same, measured on random input."""
        parameter = next(feed_forward.parameters())
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, SIMULATED_TOKENS, d_model, generator=generator).to(parameter.device, parameter.dtype)
        return cls(linear_std, output_std, float(feed_forward(x).float().std()))


@torch.no_grad()
def initialize(layers: Sequence[MemoryLayer], schemes: Sequence[HostScheme], generator: torch.Generator) -> None:
    """Initialise one model's memory layers and the tables that they read, as their `config.init` says.

    Each layer has the host's scheme in the block after which its output is added. The generator is on the layers'
    device; values do not depend on sharding.
    """
    stds: dict[Table, list[float]] = {}
    for layer, scheme in zip(layers, schemes, strict=True):
        stds.setdefault(layer.table, []).append(layer.init_weights(scheme, generator))
    for table, wanted in stds.items():
        # A shared table has the geometric mean of what its layers need.
        std = math.exp(sum(map(math.log, wanted)) / len(wanted)) if all(wanted) else 0.0
        table.init_weights(std, generator)


def table_std(config: MemoryConfig, d_model: int, linear_std: float, product_std: float) -> float:
    """Standard deviation of values (and pre-values) for which a weighted value has std `product_std`."""
    if not config.pre_value_dim:
        return product_std
    # The std of a pre-value product, for pre-values of std 1.
    pre_std = linear_std * math.sqrt(d_model * config.pre_value_dim)
    activation = ACTIVATIONS[config.pre_activation]
    low, high = 1e-9, 1e9
    for _ in range(64):  # bisection: the product's std grows with the table's
        middle = math.sqrt(low * high)
        if middle * math.sqrt(second_moment(activation, pre_std * middle)) < product_std:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def second_moment(function: Callable[[Tensor], Tensor], std: float) -> float:
    """E[f(z)²] for normal z with mean 0, by quadrature over 10 standard deviations."""
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(function(z * std).square() * density, z))
