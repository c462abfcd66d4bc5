"""Whether a stored checkpoint is of a given model."""

from __future__ import annotations

from pathlib import Path

from olmo_core.distributed.checkpoint import get_checkpoint_metadata

from ultramem.errors import UltraMemError, first_line
from ultramem.hosts.olmo_core.config import ModelConfig


def check_stored_model(directory: Path, config: ModelConfig) -> None:
    """Compare names and shapes in a distributed checkpoint with those of the model that `config` describes.

    Args:
        directory: the distributed checkpoint: `model_and_optim` of a checkpoint of OLMo-core's trainer.
        config: of the model.

    Raises:
        UltraMemError: they differ, or the checkpoint's metadata cannot be read.
    """
    try:
        stored = get_checkpoint_metadata(directory).state_dict_metadata
    except Exception as error:
        reason = first_line(error)
        raise UltraMemError(f"{directory} is damaged ({reason}); use an earlier checkpoint") from error
    shapes = {name.removeprefix("model."): entry.size for name, entry in stored.items() if name.startswith("model.")}
    model = config.build("meta").state_dict()
    difference = _first_difference({name: tensor.shape for name, tensor in model.items()}, shapes)
    if difference:
        raise UltraMemError(
            f"{directory} is not of the model that the run's configuration describes: {difference}; put back the "
            "configuration that it was trained with"
        )


def _first_difference(expected: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> str | None:
    for name, shape in expected.items():
        if name not in stored:
            return f"it lacks {name}"
        if shape != stored[name]:
            return f"{name} has the shape {tuple(stored[name])}, not {tuple(shape)}"
    surplus = stored.keys() - expected.keys()
    return f"it has {min(surplus)} as well" if surplus else None
