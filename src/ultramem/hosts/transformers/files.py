"""Loading and saving models in transformers directories."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ultramem.errors import UltraMemError, first_line
from ultramem.files.checksums import CHECKSUMS_NAME
from ultramem.files.directories import Product
from ultramem.files.whole_files import read_json_object

MODEL_CONFIG_NAME = "config.json"  # marks a directory as a model's


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
        UltraMemError: the configuration is missing or not valid.
    """
    if not (directory / MODEL_CONFIG_NAME).is_file():
        raise UltraMemError(
            f"{directory} has no {MODEL_CONFIG_NAME}; give a transformers directory, such as `ultramem export` writes"
        )
    return _plain_errors(directory, lambda: AutoConfig.from_pretrained(directory, local_files_only=True))


def load_model_file(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal language model in a directory, on the CPU. All parameters must be in its files.

    Raises:
        UltraMemError: the model is missing or damaged, or a parameter is missing or has another shape.
    """
    load_config_file(directory)
    model, report = _plain_errors(
        directory,
        lambda: AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, dtype=dtype, output_loading_info=True
        ),
    )
    wrong = [*report["missing_keys"], *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])]
    if wrong:
        raise UltraMemError(f"{directory} is damaged: {min(wrong)} is missing or of another shape; write it again")
    return model


def _plain_errors(directory: Path, load: Any) -> Any:
    try:
        return load()
    except UltraMemError:
        raise
    except Exception as error:  # of transformers and safetensors, of any kind
        reason = first_line(error)
        raise UltraMemError(f"{directory} cannot be loaded ({reason}); write it again") from error
