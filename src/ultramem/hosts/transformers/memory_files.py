"""Saving and loading an attached memory separately from its model."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ultramem.config import MemoryConfig
from ultramem.errors import UltraMemError, system_reason
from ultramem.files.whole_files import write_text
from ultramem.hosts.transformers.attachment import attach_memory, detach_memory
from ultramem.hosts.weights import check_finite_weights
from ultramem.memory import Memory

CONFIG_NAME = "memory_config.json"
WEIGHTS_NAME = "memory.safetensors"


def save_memory(model: PreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """Save only the memory, as `memory_config.json` and `memory.safetensors`.

    Raises:
        UltraMemError: the model has no memory, or the directory cannot be written.
    """
    memory = getattr(model, "memory", None)
    if not isinstance(memory, Memory):
        raise UltraMemError(f"{type(model).__name__} has no memory; attach one with attach_memory")
    path = Path(directory)
    content = {
        "memory": dataclasses.asdict(memory.config),
        "d_model": memory.d_model,
        "num_blocks": memory.num_blocks,
        "base_model": model.name_or_path or type(model).__name__,
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in memory.state_dict().items()}
    temporary = path / f"{WEIGHTS_NAME}.partial"
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(path / WEIGHTS_NAME)
        write_text(path / CONFIG_NAME, json.dumps(content, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise UltraMemError(f"{path} cannot be written ({error}); choose another directory") from error


def load_memory(model: PreTrainedModel, directory: str | os.PathLike[str]) -> Memory:
    """Attach a memory that `save_memory` wrote, in its own dtype.

    Raises:
        ConfigError: the stored configuration is not valid.
        UltraMemError: a file is missing or damaged, has weights that are not finite, or does not fit the model.
    """
    path = Path(directory)
    content = _read_config(path / CONFIG_NAME)
    hidden, blocks = model.config.get_text_config().hidden_size, model.config.get_text_config().num_hidden_layers
    if (content["d_model"], content["num_blocks"]) != (hidden, blocks):
        raise UltraMemError(
            f"{path} is the memory of a model with {content['num_blocks']} blocks of width {content['d_model']} "
            f"({content['base_model']}); {type(model).__name__} here has {blocks} of width {hidden}"
        )
    try:
        config = MemoryConfig(**content["memory"])
        tensors = load_file(path / WEIGHTS_NAME)
    except (OSError, SafetensorError, TypeError) as error:
        raise UltraMemError(f"{path} is damaged or incomplete ({error}); save the memory again") from error
    check_finite_weights(tensors, path / WEIGHTS_NAME)
    memory = attach_memory(model, config)
    # Integers instead of floating-point numbers, or the reverse, count as another shape.
    expected = {name: (*tensor.shape, tensor.is_floating_point()) for name, tensor in memory.state_dict().items()}
    found = {name: (*tensor.shape, tensor.is_floating_point()) for name, tensor in tensors.items()}
    if found != expected:
        detach_memory(model)
        wrong = min(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise UltraMemError(
            f"{path / WEIGHTS_NAME} does not fit its {CONFIG_NAME}: {wrong} is missing or of another shape"
        )
    memory.to(dtype=tensors["layers.0.query_proj.weight"].dtype)
    memory.load_state_dict(tensors)
    memory.refresh()
    return memory


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UltraMemError(
            f"{path} cannot be read ({system_reason(error)}); give a directory written by save_memory"
        ) from error
    except ValueError as error:
        raise UltraMemError(f"{path} is not valid JSON ({error}); save the memory again") from error
    needed = ("memory", "d_model", "num_blocks", "base_model")
    missing = [name for name in needed if not isinstance(content, dict) or name not in content]
    if missing:
        raise UltraMemError(f"{path}: {missing[0]} is missing; save the memory again")
    return content
