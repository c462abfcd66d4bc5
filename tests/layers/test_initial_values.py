"""Initial values: the output's scale beside real feed-forwards, the published constants, reproducibility."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem import ConfigError, HostScheme, Memory, MemoryConfig

TOKENS = 256


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, hidden_size: int, std: float, output_std: float) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(d_model, hidden_size) * std)
        self.up = nn.Parameter(torch.randn(d_model, hidden_size) * std)
        self.down = nn.Parameter(torch.randn(hidden_size, d_model) * output_std)

    def forward(self, x: Tensor) -> Tensor:
        return (F.silu(x @ self.gate) * (x @ self.up)) @ self.down


def gelu_feed_forward(d_model: int, std: float, output_std: float) -> nn.Sequential:
    feed_forward = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))
    nn.init.normal_(feed_forward[0].weight, std=std)
    nn.init.normal_(feed_forward[2].weight, std=output_std)
    for linear in (feed_forward[0], feed_forward[2]):
        nn.init.zeros_(linear.bias)
    return feed_forward


Host = Callable[[int, int], tuple[nn.Module, HostScheme]]


def paper(d: int, blocks: int) -> tuple[nn.Module, HostScheme]:
    """UltraMemV2's: weights of variance 2 / (5 d), outputs smaller by the root of twice the depth."""
    std = math.sqrt(0.4 / d)
    return SwiGLU(d, 8 * d // 3, std, std / math.sqrt(2 * blocks)), HostScheme.paper(d, blocks)


def gpt2(d: int, blocks: int) -> tuple[nn.Module, HostScheme]:
    """A constant std, a GELU feed-forward of which only a measurement is known."""
    output_std = 0.02 / math.sqrt(2 * blocks)
    feed_forward = gelu_feed_forward(d, 0.02, output_std)
    return feed_forward, HostScheme.measured(feed_forward, d, 0.02, output_std)


def llama(d: int, blocks: int) -> tuple[nn.Module, HostScheme]:
    """A constant std whatever the depth."""
    return SwiGLU(d, 3 * d, 0.02, 0.02), HostScheme.swiglu(d, 3 * d, 0.02, 0.02)


def full_megatron(d: int, blocks: int) -> tuple[nn.Module, HostScheme]:
    """That of the published runs."""
    std, output_std = 0.02282, 0.02282 / math.sqrt(2 * blocks)
    return SwiGLU(d, 2496, std, output_std), HostScheme.swiglu(d, 2496, std, output_std)


HOSTS: list[Host] = [paper, gpt2, llama, full_megatron]
SIZES: dict[str, Any] = {"num_keys": 48, "key_dim": 32, "value_dim": 32, "top_k": 16}


def assert_matched(config: MemoryConfig, host: Host, d_model: int, blocks: int) -> None:
    torch.manual_seed(0)
    feed_forward, scheme = host(d_model, blocks)
    memory = Memory(config, d_model, blocks, scheme=scheme).eval()
    x = F.rms_norm(torch.randn(TOKENS, d_model), (d_model,))
    with torch.no_grad():
        expected = feed_forward(x).std()
        ratios = [float(layer(x).std() / expected) for layer in memory.layers]
    assert len(ratios) == len(memory.insertions) > 0
    assert all(0.8 < ratio < 1.25 for ratio in ratios), ratios


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("d_model", "blocks"), [(64, 2), (256, 8), (768, 20)])
def test_matched_ultramem_v2(host: Host, d_model: int, blocks: int) -> None:
    assert_matched(MemoryConfig(**SIZES, pre_value_dim=32), host, d_model, blocks)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "pkm", "heads": 2, "value_dim": 64},
        {"kind": "memory_plus"},
        {"kind": "memory_plus", "heads": 4},
        {"kind": "ultramem"},
        {"kind": "ultramem", "heads": 2, "pre_value_dim": 16, "value_projectors": "single"},
        {"pre_value_dim": 0},
        {"pre_value_dim": 16, "pre_activation": "gelu"},
        {"pre_value_dim": 96, "pre_activation": "silu", "heads": 2},
        {"pre_value_dim": 32, "key_expansion": 2, "value_projectors": "per_block"},
        {"pre_value_dim": 32, "tucker_rank": 3, "cores": 4, "query_per_rank": False},
        {"pre_value_dim": 32, "top_k": 128, "axis_top_k": 16, "share_ratio": 0.3, "sharing": "block"},
        {"pre_value_dim": 32, "tucker_rank": 1, "cores": 1, "query_conv": 4},
        {"pre_value_dim": 32, "top_k": 4096, "num_keys": 64, "insertion": "0:1"},  # reads everything
    ],
    ids=str,
)
def test_matched_switches(host: Host, options: dict[str, Any]) -> None:
    assert_matched(MemoryConfig(**SIZES | options), host, 64, 4)


@pytest.mark.parametrize("kind", ["pkm", "memory_plus", "ultramem"])
@pytest.mark.parametrize(("d_model", "blocks"), [(256, 8), (768, 20)])
def test_matched_kinds_at_larger_sizes(kind: Any, d_model: int, blocks: int) -> None:
    value_dim = d_model if kind == "pkm" else 96
    config = MemoryConfig(kind=kind, insertion="0:0/1:1", **SIZES | {"value_dim": value_dim})
    assert_matched(config, full_megatron, d_model, blocks)


def test_schemes_of_single_blocks() -> None:
    """Outputs that shrink with the depth, as in many hosts: each layer follows the block that it adds to."""
    schemes = [HostScheme.swiglu(64, 256, 0.1, 0.1 / (block + 1)) for block in range(4)]
    config = MemoryConfig(**SIZES, pre_value_dim=16, insertion="0:0/1:3")
    memory = Memory(config, 64, 4, scheme=schemes)
    x = F.rms_norm(torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(0)), (64,))
    for layer, block in zip(memory.layers, (0, 3), strict=True):
        assert 0.8 < layer(x).std() / schemes[block].feed_forward_std < 1.25
    with pytest.raises(ConfigError, match="scheme: 3 given for 4 blocks; give one, or one per block"):
        Memory(config, 64, 4, scheme=schemes[:3])


@pytest.mark.parametrize(("d_model", "hidden_size", "std"), [(64, 256, 0.02), (256, 700, 0.3), (768, 2496, 0.02282)])
def test_swiglu_scheme_against_a_measurement(d_model: int, hidden_size: int, std: float) -> None:
    torch.manual_seed(0)
    feed_forward = SwiGLU(d_model, hidden_size, std, std / 3)
    x = torch.randn(1000, d_model)
    with torch.no_grad():
        measured = feed_forward(x).std().item()
    assert HostScheme.swiglu(d_model, hidden_size, std, std / 3).feed_forward_std == pytest.approx(measured, rel=0.1)
    assert HostScheme.measured(feed_forward, d_model, std, std / 3).feed_forward_std == pytest.approx(measured, rel=0.1)


def test_mean_chosen_score_is_1() -> None:
    layer = Memory(MemoryConfig(**SIZES), 64, 1).layers[0]
    scores, _ = layer.retrieve(layer.queries(torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(0))))
    assert scores.mean().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_constants(dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {"num_keys": 40, "key_dim": 64, "value_dim": 128, "init": "published"}

    def std(tensor: Tensor) -> float:
        return tensor.float().std().item()

    v2 = Memory(MemoryConfig(pre_value_dim=64, **sizes), 256, 2, dtype=dtype)
    layer = v2.layers[0]
    assert std(v2.table.values) == pytest.approx(0.02, rel=0.05)
    assert std(v2.table.pre_values) == pytest.approx(0.02, rel=0.05)
    assert layer.query_norm.weight.float().unique().tolist() == pytest.approx([64**-0.4], rel=0.01)
    assert layer.key_norm.weight.float().unique().tolist() == pytest.approx([64**-0.4], rel=0.01)
    assert std(layer.pre_proj.weight) == pytest.approx(256**-0.5, rel=0.05)
    assert std(layer.output_proj.weight) == pytest.approx(128**-0.5, rel=0.05)
    assert 0 <= layer.cores.min() < layer.cores.max() <= 1

    ultramem = Memory(MemoryConfig(kind="ultramem", **sizes), 256, 1, dtype=dtype).layers[0]
    assert ultramem.query_norm.weight.float().unique().tolist() == pytest.approx([64**-0.33], rel=0.01)
    assert std(ultramem.output_proj.weight) == pytest.approx(512**-0.5, rel=0.05)

    memory_plus = Memory(MemoryConfig(kind="memory_plus", **sizes), 256, 1, dtype=dtype).layers[0]
    assert std(memory_plus.table.values) == pytest.approx(0.02, rel=0.05)
    assert std(memory_plus.keys) == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    assert memory_plus.query_norm.weight.unique().tolist() == [1]


@pytest.mark.parametrize("kind", ["pkm", "memory_plus", "ultramem", "ultramem_v2"])
def test_zero_output_is_zero_and_learns(kind: Any) -> None:
    memory = Memory(MemoryConfig(kind=kind, init="zero_output", **SIZES | {"value_dim": 64}), 64, 2)
    y = memory.layers[0](torch.randn(9, 64))
    assert (y == 0).all()
    y.backward(torch.randn(9, 64))
    learner = memory.layers[0].table.values if kind == "pkm" else memory.layers[0].output_proj.weight
    assert learner.grad.abs().sum() > 0


ALL_SWITCHES: list[dict[str, Any]] = [
    {"kind": "pkm", "value_dim": 64, "query_conv": 3},
    {"kind": "memory_plus", "heads": 2},
    {"kind": "ultramem", "init": "published", "query_conv": 2},
    {"pre_value_dim": 16, "pre_activation": "gelu", "heads": 2, "query_conv": 3},
    {"pre_value_dim": 16, "init": "zero_output"},
]


@pytest.mark.parametrize("options", ALL_SWITCHES, ids=str)
def test_a_host_with_the_same_seed_draws_other_values(options: dict[str, Any]) -> None:
    """Equal streams of random numbers would correlate the host's weights with the memory's."""
    query_weight = Memory(MemoryConfig(**SIZES | options), 64, 1, seed=5).layers[0].query_proj.weight.flatten()
    host_weight = torch.randn(query_weight.shape, generator=torch.Generator().manual_seed(5))
    assert torch.corrcoef(torch.stack([query_weight.detach(), host_weight]))[0, 1].abs() < 0.1


@pytest.mark.parametrize("options", ALL_SWITCHES, ids=str)
def test_same_seed_same_values(options: dict[str, Any]) -> None:
    config = MemoryConfig(**SIZES | options)
    first = Memory(config, 64, 2, seed=3)
    torch.manual_seed(123)  # the global generator has no part in it
    second, other = Memory(config, 64, 2, seed=3), Memory(config, 64, 2, seed=4)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.layers[1].keys, other.layers[1].keys)
    assert not torch.equal(first.layers[0].keys, first.layers[1].keys)


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("options", ALL_SWITCHES, ids=str)
def test_from_the_meta_device(options: dict[str, Any], context: bool) -> None:
    config = MemoryConfig(**SIZES | options)
    direct = Memory(config, 64, 2, seed=3)
    if context:
        with torch.device("meta"):
            memory = Memory(config, 64, 2)
    else:
        memory = Memory(config, 64, 2, device="meta")
    assert all(tensor.is_meta for tensor in memory.state_dict().values())
    memory.to_empty(device="cpu")
    for tensor in memory.state_dict().values():
        tensor.fill_(77)
    memory.init_weights(seed=3)
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, memory.state_dict()[name]), name
