"""Directories of whole models: writing one, and reading the weights that training starts from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ultramem.errors import UltraMemError
from ultramem.filesystem import remove
from ultramem.hosts.olmo_core import ModelConfig
from ultramem.interop.transformers_models import from_transformers_config, from_transformers_state

_MODEL_CONFIG = "config.json"


@contextmanager
def new_directory(path: Path, overwrite: bool) -> Iterator[Path]:
    """A directory beside `path` to write to, which becomes `path` at the end, or is removed after an error.

    Raises:
        UltraMemError: `path` is there and is not an empty directory, or it cannot be written.
    """
    path = path.absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not (path / _MODEL_CONFIG).is_file():
            raise UltraMemError(f"{path} is there and holds no model; name another directory")
        if not overwrite:
            raise UltraMemError(f"{path} holds a model; name another directory, or replace it with --overwrite")
    partial = path.with_name(f"{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            remove(path)
        partial.rename(path)
    except OSError as error:
        raise UltraMemError(f"{path} cannot be written ({error.strerror or error}); name another directory") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration, for the training host, of a model in a transformers directory.

    Raises:
        UltraMemError: there is none, or the training host does not have its architecture.
    """
    directory = Path(path)
    if not (directory / _MODEL_CONFIG).is_file():
        raise UltraMemError(f"{directory} has no {_MODEL_CONFIG}; name a directory that `ultramem export` wrote")
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
