"""Reading transformers directories for the training host."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ultramem.convert.transformers_models import from_transformers_config, from_transformers_state
from ultramem.hosts.olmo_core import ModelConfig
from ultramem.hosts.transformers.files import load_config_file, load_model_file


def read_config(path: Path) -> ModelConfig:
    """Read the configuration of a model, for the training host.

    Raises:
        UltraMemError: there is no model, or the training host does not support its architecture.
    """
    return from_transformers_config(load_config_file(path))


def read_model(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a model's configuration, and its state with the training host's names, in float32 on the CPU.

    Raises:
        UltraMemError: as in `read_config`; or the weights are missing, damaged or incomplete.
    """
    config = read_config(path)
    state = load_model_file(path, torch.float32).state_dict()
    if config.tie_embeddings:
        state.pop("lm_head.weight", None)
    return config, from_transformers_state(state, config)
