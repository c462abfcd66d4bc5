"""Reading models from transformers directories for the training host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ultramem.errors import UltraMemError
from ultramem.hosts.olmo_core import ModelConfig
from ultramem.hosts.transformers.model import MODEL_CONFIG_NAME
from ultramem.interop.transformers_models import from_transformers_config, from_transformers_state


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration, for the training host, of a model in a transformers directory.

    Raises:
        UltraMemError: there is none, or the training host does not have its architecture.
    """
    directory = Path(path)
    if not (directory / MODEL_CONFIG_NAME).is_file():
        raise UltraMemError(f"{directory} has no {MODEL_CONFIG_NAME}; name a directory that `ultramem export` wrote")
    return from_transformers_config(_loaded(AutoConfig, directory))


def read_model(path: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A model's configuration, and its state under the training host's names, float32 on the CPU.

    Raises:
        UltraMemError: as in `read_config`; or the weights are missing or damaged.
    """
    config = read_config(path)
    state = _loaded(AutoModelForCausalLM, Path(path), dtype=torch.float32).state_dict()
    if config.tie_embeddings:
        state.pop("lm_head.weight", None)
    return config, from_transformers_state(state, config)


def _loaded(auto: Any, directory: Path, **options: Any) -> Any:
    try:
        return auto.from_pretrained(directory, local_files_only=True, **options)
    except UltraMemError:
        raise
    except Exception as error:  # of transformers and safetensors, of any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UltraMemError(f"{directory} cannot be loaded ({reason}); write it again") from error
