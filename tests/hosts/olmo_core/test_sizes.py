"""Sizes by arithmetic against those of models that are built."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from ultramem import MemoryConfig
from ultramem.hosts.olmo_core import PRESETS, ModelConfig, preset
from ultramem.hosts.olmo_core.sizes import bytes_to_load, bytes_to_train, count_parameters

SIZES: dict[str, Any] = {
    "d_model": 16, "num_blocks": 5, "num_heads": 2, "feed_forward_size": 24, "vocab_size": 32,
}  # fmt: skip
MEMORIES = {
    "pkm": MemoryConfig(kind="pkm", num_keys=5, key_dim=6, value_dim=16, top_k=4, heads=3, insertion="0:0/2:4"),
    "memory_plus": MemoryConfig(kind="memory_plus", num_keys=5, key_dim=6, value_dim=7, top_k=4, heads=3, query_conv=3),
    "ultramem": MemoryConfig(
        kind="ultramem", num_keys=5, key_dim=6, value_dim=8, top_k=4, heads=3, tucker_rank=3, cores=4, insertion="0:1"
    ),
    "ultramem_v2": MemoryConfig(
        num_keys=5, key_dim=6, value_dim=9, pre_value_dim=5, top_k=4, cores=3, key_expansion=2, share_ratio=0.5
    ),
    "none": MemoryConfig(insertion="none"),
}


def built(config: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in config.build("meta").parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", MEMORIES)
def test_with_memory(kind: str, tied: bool) -> None:
    config = ModelConfig(**SIZES, memory=MEMORIES[kind], tie_embeddings=tied)
    assert sum(count_parameters(config).values()) == built(config)


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.endswith("1b")])
def test_presets(preset: str) -> None:
    config = replace(PRESETS[preset], num_blocks=3) if preset.startswith(("dense", "olmoe")) else PRESETS[preset]
    assert sum(count_parameters(config).values()) == built(config)


def test_bytes() -> None:
    """In float32: 4 bytes for a parameter; in training as many for its gradient and each of two moments."""
    config = ModelConfig(**SIZES, memory=MEMORIES["ultramem_v2"])
    assert sum(bytes_to_load(config).values()) == 4 * built(config)
    assert sum(bytes_to_train(config).values()) == 16 * built(config)
    assert sum(bytes_to_train(config, 0.5).values()) == 8 * built(config)


def test_a_table_with_the_rowwise_optimizer_needs_its_parameters_alone() -> None:
    rowwise = preset("ultramem_v2_small")
    assert rowwise.memory is not None
    adamw = replace(rowwise, memory=replace(rowwise.memory, optimizer="adamw", value_lr=None))
    table = sum(parameter.numel() for parameter in adamw.build("meta").memory.value_parameters().values())
    assert sum(bytes_to_train(rowwise).values()) == 16 * built(adamw) - 12 * table


@pytest.mark.parametrize(
    ("field", "value", "parameters"),
    [
        ("vocab_size", 10**9, 16 * 10**9),
        ("d_model", 10**6, 20 * 10**12),
        ("feed_forward_size", 10**6, 240 * 10**6),
        ("memory.num_keys", 10**6, 5 * 10**12 * 14),
        ("memory.value_dim", 9 * 10**5, 5 * 25 * 9 * 10**5),
    ],
)
def test_the_size_to_lower_is_named_without_building(field: str, value: int, parameters: int) -> None:
    section, _, name = field.rpartition(".")
    memory = replace(MEMORIES["ultramem_v2"], **({name: value} if section else {}))
    start = time.perf_counter()
    counts = count_parameters(ModelConfig(**(SIZES | ({} if section else {name: value})), memory=memory))
    assert time.perf_counter() - start < 0.5
    largest = max(counts, key=lambda counted: counts[counted])
    assert largest == f"model.{field}={value}"
    assert parameters <= counts[largest] < 1.01 * parameters
