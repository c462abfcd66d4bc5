"""Loading and saving models in transformers directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ultramem.config import MOST_BLOCKS
from ultramem.errors import UltraMemError, first_line
from ultramem.files.whole_files import read_json_object
from ultramem.hosts.weights import check_finite_weights

MODEL_CONFIG_NAME = "config.json"  # marks a directory as a model's
# Files of a model's directory; one with other files is never replaced.
MODEL_CONTENTS = ("*.json", "*.safetensors", "*.jinja", "modeling_ultramem.py", "README.md", "memory")


def load_config_file(directory: Path) -> PreTrainedConfig:
    """Load the configuration of the model in a directory.

    Raises:
        UltraMemError: the configuration is missing or not valid.
    """
    if not (directory / MODEL_CONFIG_NAME).is_file():
        raise UltraMemError(
            f"{directory} has no {MODEL_CONFIG_NAME}; give a transformers directory, such as `ultramem export` writes"
        )
    blocks = read_json_object(directory / MODEL_CONFIG_NAME).get("num_hidden_layers", 0)
    if not isinstance(blocks, int) or blocks > MOST_BLOCKS:  # transformers would go on for hours
        raise UltraMemError(
            f"{directory / MODEL_CONFIG_NAME}: num_hidden_layers={blocks!r}: must be a whole number up to {MOST_BLOCKS}"
            "; restore the model's own"
        )
    return _plain_errors(directory, lambda: AutoConfig.from_pretrained(directory, local_files_only=True))


def load_model_file(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the causal language model in a directory, on the CPU. All parameters must be in its files.

    Raises:
        UltraMemError: the model is missing or damaged, or a parameter is missing, has another shape or is not finite.
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
    check_finite_weights(model.state_dict(), directory)
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
