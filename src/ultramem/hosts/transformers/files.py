"""Loading and saving models in transformers directories, and attached memories apart from their models."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ultramem.config import LARGEST_COUNT, MemoryConfig
from ultramem.configuration.decoding import decode, dotted_keys
from ultramem.configuration.field_types import check_types
from ultramem.data.tokenizers import plain_errors
from ultramem.errors import ConfigError, UltraMemError, first_line
from ultramem.files.checksums import CHECKSUMS_NAME, Checksums, check_files
from ultramem.files.directories import Product
from ultramem.files.json_files import damaged, read_json, read_json_object
from ultramem.files.whole_files import whole_file, write_text
from ultramem.hosts.transformers.attachment import attach_memory, detach_memory
from ultramem.hosts.weights import check_finite_weights
from ultramem.memory import Memory

MODEL_CONFIG_NAME = "config.json"  # marks a directory as a model's
MEMORY_CONFIG_NAME, MEMORY_WEIGHTS_NAME = "memory_config.json", "memory.safetensors"
_LOCAL = {"local_files_only": True, "trust_remote_code": False}  # neither the network nor code of the directory
MODEL_FILES = (MODEL_CONFIG_NAME, "generation_config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = ("*token*.json", "*.jinja")


def check_model_files(directory: Path, patterns: Sequence[str] = MODEL_FILES) -> None:
    """Compare files of a directory with its `checksums.json`, if it has one that lists them.

    Raises:
        UltraMemError: a file is missing or damaged, or cannot be read.
    """
    names = (path.name for path in directory.iterdir())
    check_files(directory, [name for name in names if any(map(partial(fnmatch, name), patterns))], "write it again")


def save_checksums(directory: Path) -> None:
    """Write `checksums.json` for all files in a directory, but not below it.

    Raises:
        OSError: a file cannot be read, or it cannot be written.
    """
    Checksums.compute(directory, [path.name for path in directory.iterdir() if path.is_file()]).save()


def _is_ours(directory: Path) -> bool:
    """Whether the model in a directory was written by a command of ours, and not, say, downloaded."""
    if "model_type" not in read_json_object(directory / MODEL_CONFIG_NAME):
        return False
    card = directory / "README.md"
    of_ours = (CHECKSUMS_NAME, "modeling_ultramem.py", "finetuning.json")  # the last two also in version 0.1
    return any((directory / name).is_file() for name in of_ours) or (
        card.is_file() and b"\n- ultramem\n" in card.read_bytes()
    )


MODEL_DIRECTORY = Product(
    MODEL_CONFIG_NAME,
    _is_ours,
    re.compile(
        r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|finetuning)\.json"
        r"|model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|model\.safetensors\.index\.json|merges\.txt|tokenizer\.model"
        r"|chat_template\.jinja|modeling_ultramem\.py|README\.md|memory/(memory_config\.json|memory\.safetensors)?"
    ),
)


def load_config_file(directory: Path) -> PreTrainedConfig:
    """Load the configuration of the model in a directory.

    Raises:
        UltraMemError: the configuration is missing, damaged or not valid.
    """
    if not (directory / MODEL_CONFIG_NAME).is_file():
        raise UltraMemError(
            f"{directory} has no {MODEL_CONFIG_NAME}; give a transformers directory, such as `ultramem export` writes"
        )
    check_model_files(directory, [MODEL_CONFIG_NAME])
    blocks = read_json_object(directory / MODEL_CONFIG_NAME).get("num_hidden_layers", 0)
    if not isinstance(blocks, int) or blocks > LARGEST_COUNT:  # transformers would go on for hours
        raise UltraMemError(
            f"{directory / MODEL_CONFIG_NAME}: num_hidden_layers={blocks!r}: must be a whole number up to "
            f"{LARGEST_COUNT}; restore the model's own"
        )
    return _plain_errors(directory, lambda: AutoConfig.from_pretrained(directory, **_LOCAL))


def load_model_file(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal language model in a directory, on the CPU. All parameters must be in its files.

    Raises:
        UltraMemError: the model is missing or damaged, or a parameter is missing, has another shape or is not finite.
    """
    if load_config_file(directory).model_type != "ultramem":  # our own class checks its files
        check_model_files(directory)
    model, report = _plain_errors(
        directory,
        lambda: AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **_LOCAL),
    )
    wrong = [*report["missing_keys"], *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])]
    if wrong:
        raise UltraMemError(f"{directory} is damaged: {min(wrong)} is missing or of another shape; write it again")
    check_finite_weights(model.state_dict(), directory)
    return model


def load_model_and_tokenizer(
    directory: Path, memory: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, with parameters in float32, and its tokenizer; attach the memory in `memory`, if given.

    Raises:
        UltraMemError: a file is missing or damaged, or the tokenizer does not fit or has no end-of-text token.
    """
    model = load_model_file(directory, torch.float32)
    check_model_files(directory, TOKENIZER_FILES)
    with plain_errors(f"the tokenizer in {directory} cannot be loaded", "put it there"):
        tokenizer = AutoTokenizer.from_pretrained(directory, **_LOCAL)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UltraMemError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, but the model {rows}; put its own there"
        )
    if tokenizer.eos_token_id is None:
        raise UltraMemError(f"the tokenizer in {directory} has no end-of-text token; set its eos_token there")
    if memory is not None:
        load_memory(model, memory).float()
    return model, tokenizer


def _plain_errors(directory: Path, load: Any) -> Any:
    try:
        return load()
    except UltraMemError:
        raise
    except Exception as error:  # of transformers and safetensors, of any kind
        reason = first_line(error)
        raise UltraMemError(f"{directory} cannot be loaded ({reason}); write it again") from error


def save_memory(model: PreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """Save only the memory, as `memory_config.json` and `memory.safetensors`, with their checksums.

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
    try:
        path.mkdir(parents=True, exist_ok=True)
        with whole_file(path / MEMORY_WEIGHTS_NAME) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_text(path / MEMORY_CONFIG_NAME, json.dumps(content, indent=2) + "\n")
        others = Checksums.load(path)  # the directory may also hold a model
        own = Checksums.compute(path, (MEMORY_CONFIG_NAME, MEMORY_WEIGHTS_NAME))
        Checksums(path, {**(others.files if others else {}), **own.files}).save()
    except (OSError, SafetensorError) as error:
        raise UltraMemError(f"{path} cannot be written ({error}); choose another directory") from error


def load_memory(model: PreTrainedModel, directory: str | os.PathLike[str]) -> Memory:
    """Attach a memory that `save_memory` wrote, in its own dtype.

    Raises:
        UltraMemError: a file is missing or damaged, has weights that are not finite, or does not fit the model.
    """
    path = Path(directory)
    check_files(path, (MEMORY_CONFIG_NAME, MEMORY_WEIGHTS_NAME), "save the memory again")
    stored = _read_memory_config(path / MEMORY_CONFIG_NAME)
    hidden, blocks = model.config.get_text_config().hidden_size, model.config.get_text_config().num_hidden_layers
    if (stored.d_model, stored.num_blocks) != (hidden, blocks):
        raise UltraMemError(
            f"{path} is the memory of a model with {stored.num_blocks} blocks of width {stored.d_model} "
            f"({stored.base_model}); {type(model).__name__} here has {blocks} of width {hidden}"
        )
    try:
        tensors = load_file(path / MEMORY_WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise UltraMemError(f"{path} is damaged or incomplete ({error}); save the memory again") from error
    check_finite_weights(tensors, path / MEMORY_WEIGHTS_NAME)
    memory = attach_memory(model, stored.memory)
    # Integers instead of floating-point numbers, or the reverse, count as another shape.
    expected = {name: (*tensor.shape, tensor.is_floating_point()) for name, tensor in memory.state_dict().items()}
    found = {name: (*tensor.shape, tensor.is_floating_point()) for name, tensor in tensors.items()}
    if found != expected:
        detach_memory(model)
        wrong = min(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise UltraMemError(
            f"{path / MEMORY_WEIGHTS_NAME} does not fit its {MEMORY_CONFIG_NAME}: {wrong} is missing or of another "
            "shape"
        )
    memory.to(dtype=tensors["layers.0.query_proj.weight"].dtype)
    try:
        memory.load_state_dict(tensors)
    except UltraMemError as error:
        detach_memory(model)
        raise UltraMemError(f"{path / MEMORY_WEIGHTS_NAME}: {error}") from error
    memory.refresh()
    return memory


@dataclasses.dataclass(frozen=True)
class _StoredMemory:
    """The content of `memory_config.json`."""

    memory: MemoryConfig
    d_model: int
    num_blocks: int
    base_model: str

    def __post_init__(self) -> None:
        check_types(self)


def _read_memory_config(path: Path) -> _StoredMemory:
    remedy = "give a directory written by save_memory, or save the memory again"
    content = read_json(path, remedy)
    try:
        return decode(_StoredMemory, content, [*dotted_keys(_StoredMemory)])
    except ConfigError as error:
        raise damaged(path, error, remedy) from error
