"""Checking that a stored checkpoint fits a model."""

from __future__ import annotations

from pathlib import Path

from olmo_core.distributed.checkpoint import get_checkpoint_metadata
from torch import Tensor

from ultramem.errors import UltraMemError, first_line
from ultramem.hosts.olmo_core.config import ModelConfig


def check_stored_model(directory: Path, config: ModelConfig) -> None:
    """Compare names and shapes in a distributed checkpoint with those of the model that `config` describes.

    The directory is `model_and_optim` of a checkpoint of OLMo-core's trainer.

    Raises:
        UltraMemError: they differ, or the checkpoint's metadata cannot be read.
    """
    try:
        stored = get_checkpoint_metadata(directory).state_dict_metadata
    except Exception as error:
        reason = first_line(error)
        raise UltraMemError(f"{directory} is damaged ({reason}); use an earlier checkpoint") from error
    shapes = {name.removeprefix("model."): entry.size for name, entry in stored.items() if name.startswith("model.")}
    difference = _first_difference(config.build("meta").state_dict(), shapes)
    if difference:
        raise UltraMemError(
            f"{directory} does not fit the run's configuration: {difference}; restore the configuration of its training"
        )


def _first_difference(expected: dict[str, Tensor], stored: dict[str, tuple[int, ...]]) -> str | None:
    for name, tensor in expected.items():
        if name not in stored:
            return f"it lacks {name}"
        if tensor.shape != stored[name]:
            return f"{name} has the shape {tuple(stored[name])}, not {tuple(tensor.shape)}"
    surplus = stored.keys() - expected.keys()
    return f"it also has {min(surplus)}" if surplus else None
