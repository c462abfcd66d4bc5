"""Initial values: matched to the feed-forward beside the memory, or as published.

`matched` follows UltraMemV2 (arXiv:2508.18756), appendix A: each memory layer's output starts with the standard
deviation of the feed-forward's output beside it. Linear layers take the host's own scheme; norm gains make the mean
chosen score 1; the table's scale follows from the host's numbers and a seeded simulation of the retrieval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ultramem.config import MemoryConfig
from ultramem.layers.memory_layer import MemoryLayer
from ultramem.layers.product_key import MemoryPlus, ProductKeyMemory
from ultramem.layers.tucker import TuckerMemory
from ultramem.layers.value_table import ValueTable
from ultramem.ops.product_key_topk.naive import product_key_topk
from ultramem.ops.tucker_topk.naive import tucker_topk
from ultramem.ops.weighted_lookup.naive import ACTIVATIONS

_SIMULATED_TOKENS = 512


@dataclass(frozen=True)
class HostScheme:
    """How the host initialises the block that a memory layer stands in.

    Attributes:
        linear_std: standard deviation of the weights of linear layers that read the residual stream.
        output_std: standard deviation of the weights of linear layers that write to it.
        feed_forward_std: standard deviation of the feed-forward's output, for inputs of variance 1.
    """

    linear_std: float
    output_std: float
    feed_forward_std: float

    @classmethod
    def swiglu(cls, d_model: int, hidden_size: int, linear_std: float, output_std: float) -> HostScheme:
        """The scheme of a block with a SwiGLU feed-forward of width `hidden_size` and normal weights."""
        hidden = linear_std**2 * d_model
        variance = hidden_size * _second_moment(F.silu, math.sqrt(hidden)) * hidden * output_std**2
        return cls(linear_std, output_std, math.sqrt(variance))

    @classmethod
    def paper(cls, d_model: int, num_blocks: int, hidden_size: int | None = None) -> HostScheme:
        """The scheme of UltraMemV2: weights of variance 2 / (5 d), outputs scaled by 1 / sqrt(2 L)."""
        std = math.sqrt(2 / (5 * d_model))
        return cls.swiglu(d_model, hidden_size or 8 * d_model // 3, std, std / math.sqrt(2 * num_blocks))

    @classmethod
    @torch.no_grad()
    def measured(cls, feed_forward: nn.Module, d_model: int, linear_std: float, output_std: float) -> HostScheme:
        """The scheme of a block with any feed-forward, (1, tokens, d_model) to the same, measured on random input."""
        parameter = next(feed_forward.parameters())
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, _SIMULATED_TOKENS, d_model, generator=generator).to(parameter.device, parameter.dtype)
        return cls(linear_std, output_std, float(feed_forward(x).float().std()))


@torch.no_grad()
def initialize(
    config: MemoryConfig,
    layers: Sequence[MemoryLayer],
    schemes: Sequence[HostScheme],
    generator: torch.Generator,
) -> None:
    """Initialise memory layers and the tables that they read, as `config.init` says.

    Args:
        config: of the layers.
        layers: the memory layers of one model.
        schemes: the host's scheme in the block whose residual stream each layer adds to.
        generator: on the layers' device; the same seed gives the same values, sharded or not.
    """
    value_stds: dict[ValueTable, list[float]] = {}
    for layer, scheme in zip(layers, schemes, strict=True):
        if config.init == "published":
            _published_layer(layer, generator)
            value_std = 0.02
        else:
            value_std = _matched_layer(layer, scheme, generator)
        value_stds.setdefault(layer.table, []).append(value_std)
    for table, stds in value_stds.items():
        # A shared table serves all its layers best with the geometric mean of what each would want.
        std = math.exp(sum(map(math.log, stds)) / len(stds))
        if config.init == "zero_output" and config.kind == "pkm":
            std = 0.0
        for parameter in table.parameters():
            _normal(parameter, std, generator)


def _matched_layer(layer: MemoryLayer, scheme: HostScheme, generator: torch.Generator) -> float:
    """Initialise all but the table; returns the table's standard deviation."""
    config = layer.config
    _normal(layer.query_proj.weight, scheme.linear_std, generator)
    _initialize_convolution(layer)
    if isinstance(layer, TuckerMemory):
        _normal(layer.keys, config.key_dim**-0.5, generator)
        _initialize_cores(layer, generator)
        mean, second_moment = simulate_tucker_scores(layer)
        # A layer that reads nearly every row has a mean score of about 0, which cannot be scaled to 1.
        mean = max(mean, math.sqrt(second_moment) / 2)
        # Scores grow with the square of both gains.
        gain = mean**-0.25
        nn.init.constant_(layer.query_norm.weight, gain)
        nn.init.constant_(layer.key_norm.weight, gain)
        squared_weights = config.heads * config.top_k * second_moment / mean**2
        if layer.pre_proj is not None:
            _normal(layer.pre_proj.weight, scheme.linear_std, generator)
    else:
        assert isinstance(layer, ProductKeyMemory)
        _initialize_product_keys(layer, generator)
        squared_weights = config.heads * simulate_product_key_weights(layer, scheme)
        if isinstance(layer, MemoryPlus):
            _normal(layer.gate_proj.weight, scheme.linear_std, generator)
            squared_weights *= _second_moment(F.silu, scheme.linear_std * math.sqrt(layer.d_model))
    target = scheme.feed_forward_std
    if isinstance(layer, TuckerMemory | MemoryPlus):
        output_std = 0.0 if config.init == "zero_output" else scheme.output_std
        _normal(layer.output_proj.weight, output_std, generator)
        target /= scheme.output_std * math.sqrt(config.value_dim)
    return _table_std(config, layer.d_model, scheme.linear_std, target / math.sqrt(squared_weights))


def _table_std(config: MemoryConfig, d_model: int, linear_std: float, product_std: float) -> float:
    """The standard deviation of values (and pre-values) for which a weighted value has std `product_std`."""
    if not config.pre_value_dim:
        return product_std
    # The std of a pre-value product, for pre-values of std 1.
    pre_std = linear_std * math.sqrt(d_model * config.pre_value_dim)
    activation = ACTIVATIONS[config.pre_activation]
    low, high = 1e-9, 1e9
    for _ in range(64):  # bisection: the product's std grows with the table's
        middle = math.sqrt(low * high)
        if middle * math.sqrt(_second_moment(activation, pre_std * middle)) < product_std:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def _published_layer(layer: MemoryLayer, generator: torch.Generator) -> None:
    config = layer.config
    _initialize_convolution(layer)
    if isinstance(layer, TuckerMemory):
        _normal(layer.query_proj.weight, config.key_dim**-0.5, generator)
        _normal(layer.keys, config.key_dim**-0.5, generator)
        _initialize_cores(layer, generator)
        gain = config.key_dim ** (-0.33 if config.kind == "ultramem" else -0.4)
        nn.init.constant_(layer.query_norm.weight, gain)
        nn.init.constant_(layer.key_norm.weight, gain)
        _normal(layer.output_proj.weight, config.output_width**-0.5, generator)
        if layer.pre_proj is not None:
            _normal(layer.pre_proj.weight, layer.d_model**-0.5, generator)
        return
    assert isinstance(layer, ProductKeyMemory)
    _normal(layer.query_proj.weight, layer.d_model**-0.5, generator)
    _initialize_product_keys(layer, generator)
    if isinstance(layer, MemoryPlus):
        _normal(layer.gate_proj.weight, layer.d_model**-0.5, generator)
        _normal(layer.output_proj.weight, config.value_dim**-0.5, generator)


def _initialize_convolution(layer: MemoryLayer) -> None:
    """The identity: queries start as they would be without the convolution."""
    if layer.query_conv is not None:
        _fill(layer.query_conv.weight, lambda full: full.zero_()[..., -1].fill_(1.0))


def _initialize_product_keys(layer: ProductKeyMemory, generator: torch.Generator) -> None:
    """Keys as in PKM (arXiv:1907.05242) and Memory+: uniform, of variance 1 / (3 key_dim)."""
    bound = layer.config.key_dim**-0.5
    _fill(layer.keys, lambda full: full.uniform_(-bound, bound, generator=generator))
    if isinstance(layer, MemoryPlus):
        nn.init.ones_(layer.query_norm.weight)


def _initialize_cores(layer: TuckerMemory, generator: torch.Generator) -> None:
    _fill(layer.cores, lambda full: full.uniform_(0, 1, generator=generator))
    layer.shuffle.copy_(torch.randperm(layer.shuffle.numel(), generator=generator, device=layer.shuffle.device))
    # Cores are positive, and so are their leading singular vectors up to the joint sign, which follows the old one.
    layer.u.fill_(1)
    layer.t.fill_(1)
    layer.refresh()


def simulate_tucker_scores(layer: TuckerMemory) -> tuple[float, float]:
    """Mean and mean square of the chosen scores of a Tucker layer with norm gains of 1, on random input."""
    config, axis_keys = layer.config, layer.axis_keys
    device = layer.u.device
    generator = torch.Generator(device).manual_seed(0)
    queries = _unit_rows((2, layer.queries_per_axis, 1, _SIMULATED_TOKENS, config.key_dim), generator, config.norm_eps)
    keys = _unit_rows((2, config.tucker_rank, config.heads, axis_keys, config.key_dim), generator, config.norm_eps)
    of_tokens = queries.squeeze(2).permute(2, 0, 1, 3).expand(-1, -1, config.tucker_rank, -1)
    of_heads = keys.permute(2, 0, 3, 1, 4)
    cores = layer.cores.full_tensor() if isinstance(layer.cores, DTensor) else layer.cores
    axis_top_k = min(config.axis_top_k or config.top_k, axis_keys)
    chosen, _ = tucker_topk(
        of_tokens, of_heads, cores.float(), layer.u.float(), layer.t.float(), config.top_k, axis_top_k
    )
    return float(chosen.mean()), float(chosen.square().mean())


def simulate_product_key_weights(layer: ProductKeyMemory, scheme: HostScheme) -> float:
    """Mean over random inputs of the sum of one head's squared weights."""
    config, device = layer.config, layer.keys.device
    generator = torch.Generator(device).manual_seed(0)
    queries = torch.randn(2, _SIMULATED_TOKENS, config.key_dim, generator=generator, device=device)
    if not isinstance(layer, MemoryPlus):
        queries *= scheme.linear_std * math.sqrt(layer.d_model)
    bound = config.key_dim**-0.5
    keys = torch.empty(2, layer.axis_keys, config.key_dim, device=device).uniform_(-bound, bound, generator=generator)
    scores, _ = product_key_topk(queries.transpose(0, 1).unsqueeze(1), keys.unsqueeze(0), config.top_k)
    return float(scores.softmax(-1).square().sum(-1).mean())


def _unit_rows(shape: tuple[int, ...], generator: torch.Generator, eps: float) -> Tensor:
    return F.rms_norm(torch.randn(shape, generator=generator, device=generator.device), shape[-1:], eps=eps)


def _second_moment(function: Callable[[Tensor], Tensor], std: float) -> float:
    """E[f(z)²] for z normal with mean 0, by quadrature over 10 standard deviations."""
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(function(z * std).square() * density, z))


def _normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    _fill(parameter, lambda full: full.normal_(0, std, generator=generator))


def _fill(parameter: Tensor, fill: Callable[[Tensor], object]) -> None:
    """Fill a parameter; of a sharded one, every process fills the whole and keeps its shard."""
    if not isinstance(parameter, DTensor):
        fill(parameter)
        return
    full = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    fill(full)
    # Every process drew the same values, so nothing is sent.
    shards = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(shards.to_local())
