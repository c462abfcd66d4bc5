"""Reading models from transformers directories for the training host."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ultramem.convert.transformers_models import from_transformers_config, from_transformers_state
from ultramem.hosts.olmo_core import ModelConfig
from ultramem.hosts.transformers.files import load_config_file, load_model_file


def read_config(path: Path) -> ModelConfig:
    """The configuration, for the training host, of a model in a transformers directory.

    Raises:
        UltraMemError: there is none, or the training host does not have its architecture.
    """
    return from_transformers_config(load_config_file(path))


def read_model(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A model's configuration, and its state under the training host's names, float32 on the CPU.

    Raises:
        UltraMemError: as in `read_config`; or the weights are missing, damaged or not complete.
    """
    config = read_config(path)
    state = load_model_file(path, torch.float32).state_dict()
    if config.tie_embeddings:
        state.pop("lm_head.weight", None)
    return config, from_transformers_state(state, config)
