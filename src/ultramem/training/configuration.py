"""Reading a run's configuration; its model may be that of its initial weights."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ultramem.convert.initial_weights import read_model_config
from ultramem.runs import config_files
from ultramem.runs.config import RunConfig


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file. If its model section does not describe a model, the model is that of the initial weights.

    Args:
        path: the file.
        overrides: overrides such as `--optimizer.learning_rate=3e-4` or `model.memory=null`; values are YAML.

    Raises:
        ConfigError: the file is missing or not valid, or a key or value is invalid.
        UltraMemError: the vocabulary size is that of the data, and the data is missing or damaged; or the model is
            that of the initial weights, and they cannot be read.
    """
    return config_files.load_config(path, overrides, read_model_config)
