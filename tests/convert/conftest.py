"""Short training runs of every system, with a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ultramem import MemoryConfig
from ultramem.data.tokenize import TokenizeConfig, tokenize
from ultramem.hosts.olmo_core import ModelConfig, MoEConfig
from ultramem.training import DataConfig, RunConfig, TrainerConfig, train

V2 = {"num_keys": 8, "key_dim": 8, "value_dim": 8, "pre_value_dim": 8, "top_k": 4, "share_ratio": 0.5}
SYSTEMS: dict[str, dict[str, object]] = {
    "dense": {"tie_embeddings": False},
    "ultramem_v2": {"memory": MemoryConfig(**V2)},  # type: ignore[arg-type]
    "ultramem_v2 with tables in bfloat16": {
        "memory": MemoryConfig(**V2, optimizer="rowwise", table_dtype="bfloat16")  # type: ignore[arg-type]
    },
    "ultramem": {
        "memory": MemoryConfig(
            kind="ultramem", num_keys=8, key_dim=8, value_dim=8, top_k=4, heads=2, insertion="0:1/1:2"
        )
    },
    "memory_plus": {"memory": MemoryConfig(kind="memory_plus", num_keys=8, key_dim=8, value_dim=16, top_k=4)},
    "pkm": {"memory": MemoryConfig(kind="pkm", num_keys=8, key_dim=8, value_dim=32, top_k=4)},
    "moe": {"feed_forward_size": 0, "moe": MoEConfig(hidden_size=16, num_experts=4, top_k=2)},
}


@pytest.fixture(scope="session")
def token_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of a small text, with their tokenizer."""
    root = tmp_path_factory.mktemp("text")
    sources = root / "sources"
    sources.mkdir()
    for number in range(12):
        lines = [f"line {line} of text {number}: {line * number}" for line in range(60)]
        (sources / f"{number:02d}.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenize(TokenizeConfig(sources=(sources,), output=root / "tokens", train_bpe=280, heldout=0.2))
    return root / "tokens"


@pytest.fixture(scope="session")
def train_run(token_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains a system for a few steps, once; returns the run directory."""
    runs: dict[str, Path] = {}

    def run(system: str) -> Path:
        if system not in runs:
            directory = tmp_path_factory.mktemp(system) / "run"
            sizes = {"d_model": 32, "num_blocks": 3, "num_heads": 2, "feed_forward_size": 48, "vocab_size": 384}
            config = RunConfig(
                model=ModelConfig(**(sizes | SYSTEMS[system])),  # type: ignore[arg-type]
                data=DataConfig(token_directory, 32),
                trainer=TrainerConfig(directory, batch_size=128, steps=4, device="cpu", evaluate_interval=None),
            )
            train(config)
            runs[system] = directory
        return runs[system]

    return run


@pytest.fixture
def run_yaml(token_directory: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration without a model that starts from a transformers directory."""

    def write(initial_weights: Path, **sections: object) -> Path:
        content: dict[str, object] = {
            "data": {"directory": str(token_directory), "sequence_length": 32},
            "trainer": {
                "directory": str(tmp_path / "continued"), "batch_size": 128, "steps": 2, "device": "cpu",
                "initial_weights": str(initial_weights), "evaluate_interval": None,
            },
            **sections,
        }  # fmt: skip
        path = tmp_path / "continued.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write
