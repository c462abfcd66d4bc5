"""Loading and saving models in transformers directories."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ultramem.errors import UltraMemError, first_line, system_reason
from ultramem.files.checksums import Checksums, check_files

MODEL_CONFIG_NAME = "config.json"  # marks a directory as a model's
# Files of a model's directory; one with other files is never replaced.
MODEL_CONTENTS = ("*.json", "*.safetensors", "*.jinja", "modeling_ultramem.py", "README.md", "memory")


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
        UltraMemError: a file cannot be read, or it cannot be written.
    """
    try:
        Checksums.compute(directory, [path.name for path in directory.iterdir() if path.is_file()]).save()
    except OSError as error:
        raise UltraMemError(f"{directory} cannot be written ({system_reason(error)}); free some space") from error


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
    return _plain_errors(directory, lambda: AutoConfig.from_pretrained(directory, **_LOCAL))


def load_model_file(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal language model in a directory, on the CPU. All parameters must be in its files.

    Raises:
        UltraMemError: the model is missing or damaged, or a parameter is missing or has another shape.
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
    return model


def save_model_file(model: PreTrainedModel, directory: Path, **options: Any) -> None:
    """Call `save_pretrained`.

    Raises:
        UltraMemError: the directory cannot be written.
    """
    try:
        model.save_pretrained(directory, **options)
    except (OSError, SafetensorError) as error:
        raise UltraMemError(f"{directory} cannot be written ({error}); choose another directory") from error


def _plain_errors(directory: Path, load: Any) -> Any:
    try:
        return load()
    except UltraMemError:
        raise
    except Exception as error:  # of transformers and safetensors, of any kind
        reason = first_line(error)
        raise UltraMemError(f"{directory} cannot be loaded ({reason}); write it again") from error
