"""Stored checkpoints of a model's own configuration and of others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from olmo_core.distributed.checkpoint import save_model_and_optim_state

from ultramem import MemoryConfig, UltraMemError
from ultramem.hosts.olmo_core import ModelConfig, MoEConfig
from ultramem.hosts.olmo_core.checkpoint import check_stored_model

SIZES: dict[str, Any] = {"d_model": 16, "num_blocks": 2, "num_heads": 2, "feed_forward_size": 24, "vocab_size": 32}
MEMORY = MemoryConfig(num_keys=6, key_dim=4, value_dim=16, top_k=4)
SYSTEMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "untied": {"tie_embeddings": False},
    "moe": {"moe": MoEConfig(hidden_size=8, num_experts=4, top_k=2)},
    "pkm": {"memory": replace(MEMORY, kind="pkm", query_per_rank=False)},
    "ultramem": {"memory": replace(MEMORY, kind="ultramem", insertion="0:1")},
    "ultramem_v2": {"memory": MEMORY},
}


def store(config: ModelConfig, directory: Path) -> Path:
    model = config.build()
    model.init_weights()
    save_model_and_optim_state(directory, model)
    return directory


@pytest.mark.parametrize("system", SYSTEMS)
def test_own_checkpoint(system: str, tmp_path: Path) -> None:
    config = ModelConfig(**SIZES, **SYSTEMS[system])
    check_stored_model(store(config, tmp_path / "checkpoint"), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"it also has memory\.layers\.0\.cores"),
        ({"memory": replace(MEMORY, pre_value_dim=4)}, r"it lacks memory\.\S*pre_\S+"),
        (
            {"memory": replace(MEMORY, top_k=8, heads=2)},
            r"memory\.layers\.0\.\w+ has the shape \(1, .*\), not \(2, .*\)",
        ),
    ],
)
def test_checkpoint_of_another_model(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = store(ModelConfig(**SIZES, memory=MEMORY), tmp_path / "checkpoint")
    other = ModelConfig(**SIZES, **options)
    with pytest.raises(
        UltraMemError, match=f"^{directory} does not fit the run's configuration: {message}; restore the config"
    ):
        check_stored_model(directory, other)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UltraMemError, match=r"checkpoint is damaged \(.+\); use an earlier checkpoint"):
        check_stored_model(tmp_path / "checkpoint", ModelConfig(**SIZES))
