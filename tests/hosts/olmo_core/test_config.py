"""The model's configuration: what it refuses, and what follows from it."""

import math
from typing import Any

import pytest

from ultramem import ConfigError, MemoryConfig
from ultramem.hosts.olmo_core import ModelConfig, MoEConfig

SIZES: dict[str, Any] = {"d_model": 32, "num_blocks": 2, "num_heads": 2, "feed_forward_size": 48, "vocab_size": 64}
MOE = MoEConfig(hidden_size=8, num_experts=4, top_k=2)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("d_model", 0, "at least 1"),
        ("d_model", 32.0, "must be a whole number"),
        ("d_model", "32", "must be a whole number"),
        ("num_blocks", 0, "at least 1"),
        ("num_blocks", True, "must be a whole number"),
        ("num_heads", 0, "at least 1"),
        ("num_heads", 3, "divide d_model=32"),
        ("num_heads", 32, "even width"),
        ("feed_forward_size", 0, "at least 1"),
        ("feed_forward_size", None, "must be a whole number"),
        ("vocab_size", -1, "at least 1"),
        ("vocab_size", 1e3, "must be a whole number"),
        ("rope_theta", 0, "at least 1"),
        ("rope_theta", 0.5, "must be a whole number"),
        ("norm_eps", 0, "above 0"),
        ("norm_eps", math.nan, "finite number"),
        ("norm_eps", None, "must be a number"),
        ("init_std", 0.0, "above 0"),
        ("init_std", math.inf, "finite number"),
        ("init_std", "0.02", "must be a number"),
        ("tie_embeddings", 1, "must be true or false"),
        ("seed", -1, "at least 0"),
        ("seed", 2**63, "from -2"),
        ("seed", 1.5, "must be a whole number"),
    ],
)
def test_bad_value_is_named_with_its_remedy(field: str, value: Any, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as error:
        ModelConfig(**SIZES | {field: value})
    assert str(error.value).startswith(f"{field}={value!r}: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": MemoryConfig(), "moe": MOE}, "moe: must be null for a model with memory; set one of them to null"),
        ({"d_model": 36, "moe": MOE}, "d_model=36: must be a multiple of 8"),
        ({"memory": MemoryConfig(insertion="0:2")}, "memory.insertion='0:2': block 2 does not exist"),
        (
            {"memory": MemoryConfig(num_keys=2)},
            "memory.top_k=32: must be at most 4, the number of rows that a layer can reach",
        ),
        ({"memory": MemoryConfig(kind="pkm", value_dim=16)}, "memory.value_dim=16: must be d_model=32"),
    ],
)
def test_parts_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**SIZES | options)


def test_system() -> None:
    assert ModelConfig(**SIZES).system == "dense"
    assert ModelConfig(**SIZES | {"feed_forward_size": 0}, moe=MOE).system == "moe"
    for kind in ("pkm", "memory_plus", "ultramem", "ultramem_v2"):
        assert ModelConfig(**SIZES, memory=MemoryConfig(kind=kind, value_dim=32)).system == kind  # type: ignore[arg-type]
    assert ModelConfig(**SIZES, memory=MemoryConfig(insertion="none")).system == "dense"


def test_standard_deviations() -> None:
    """By default those of the papers, 0.02282 at width 768; either way residual outputs by 1 / sqrt(2 L)."""
    paper = ModelConfig(d_model=768, num_blocks=20, num_heads=12, feed_forward_size=2496)
    assert paper.linear_std == pytest.approx(0.02282, abs=5e-6)
    assert paper.output_std == pytest.approx(0.02282 / math.sqrt(40), abs=5e-6)
    given = ModelConfig(**SIZES, init_std=0.1)
    assert (given.linear_std, given.output_std) == (0.1, 0.05)
