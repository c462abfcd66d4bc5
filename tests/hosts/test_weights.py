"""Weights that are not finite, wherever they are loaded from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_finetuning import SIZES
from tiny_run import run
from ultramem import MemoryConfig
from ultramem.convert.export import export
from ultramem.convert.transformers_models import read_model
from ultramem.errors import UltraMemError
from ultramem.hosts.transformers import attach_memory, detach_memory, load_memory, save_memory
from ultramem.hosts.transformers.files import load_config_file
from ultramem.hosts.weights import check_finite_weights
from ultramem.runs.checkpoints import load_model

__all__ = ["run"]
VALUES = "memory.table.values"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_names_the_tensor(value: float, dtype: torch.dtype) -> None:
    weights = {"a": torch.ones(3), "numbers": torch.arange(3), "b": torch.ones(5, dtype=dtype)}
    check_finite_weights(weights, Path("x"))
    weights["b"][2] = value
    with pytest.raises(UltraMemError, match=r"^x has weights that are not finite, in b: its training had diverged"):
        check_finite_weights(weights, Path("x"))


def test_huge_weights_are_finite() -> None:
    check_finite_weights({"a": torch.full((4,), 3e38)}, Path("x"))


def test_of_a_checkpoint(run: Any) -> None:
    with torch.no_grad():
        run.model.state_dict()[VALUES][3] = float("nan")
    checkpoint = run.save_checkpoint(8, run.model)
    with pytest.raises(UltraMemError, match=rf"{checkpoint}\S* has weights that are not finite, in {VALUES}"):
        load_model(run.path, "cpu")


def test_of_an_exported_model(run: Any, tmp_path: Path) -> None:
    export(run.path, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.{VALUES}"][0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "model" / "checksums.json").unlink()
    with pytest.raises(UltraMemError, match=rf"model has weights that are not finite, in model\.{VALUES}"):
        read_model(tmp_path / "model")


@pytest.mark.parametrize("blocks", [10**9, "x"])
def test_a_number_of_blocks_that_nobody_builds(blocks: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": blocks}))
    with pytest.raises(UltraMemError, match=f"config.json: num_hidden_layers={blocks!r}: must be a whole number up to"):
        load_config_file(tmp_path)


def test_of_a_saved_memory(tmp_path: Path) -> None:
    """The model stays without it."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    attach_memory(model, MemoryConfig(num_keys=8, value_dim=8, top_k=4))
    model.memory.table.values.data[1] = float("nan")
    save_memory(model, tmp_path)
    detach_memory(model)
    with pytest.raises(UltraMemError, match=r"memory.safetensors has weights that are not finite, in table.values: "):
        load_memory(model, tmp_path)
    assert not hasattr(model, "memory")
