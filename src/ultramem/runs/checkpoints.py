"""Finding a run's checkpoints and loading their models."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from olmo_core.distributed.checkpoint import load_state_dict
from torch.distributed.checkpoint.api import CheckpointException

from ultramem.device import check_memory, choose_device
from ultramem.errors import UltraMemError
from ultramem.hosts.olmo_core.checkpoint import check_stored_model
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.hosts.olmo_core.sizes import bytes_to_load
from ultramem.hosts.weights import check_finite_weights
from ultramem.runs.config import RunConfig
from ultramem.runs.config_files import load_config
from ultramem.runs.layout import CONFIG_NAME

# Files of a checkpoint of OLMo-core's trainer, which writes the last one at the end.
MODEL_NAME = "model_and_optim"
_PARTS = ("train/rank0.pt", f"{MODEL_NAME}/.metadata", ".metadata.json")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a training run.

    Attributes:
        run: the run directory, an absolute path.
        step: training step after which it was written.
        config: configuration of the run.
    """

    run: Path
    step: int
    config: RunConfig

    @property
    def name(self) -> str:
        """Name of the checkpoint's directory in the run directory."""
        return checkpoint_name(self.step)

    def load_model(self, device: str = "auto") -> MemoryTransformer:
        """Load the model, in evaluation mode and without gradients.

        The distributed checkpoints of PyTorch and OLMo-core hold pickles: load only checkpoints that you trust.

        Args:
            device: `cpu`, `cuda`, or `auto` for CUDA if available.

        Raises:
            ConfigError: the device is invalid, not available or too small for the model.
            UltraMemError: the checkpoint is damaged, has weights that are not finite, or does not match the run's
                configuration.
        """
        place = choose_device(device)
        directory = self.run / self.name / MODEL_NAME
        check_memory(bytes_to_load(self.config.model), place)
        check_stored_model(directory, self.config.model)
        model = self.config.model.build("meta")
        model.to_empty(device=place)
        tensors = model.state_dict()
        if model.tie_word_embeddings:
            model.lm_head.w_out.weight = model.embeddings.weight
            del tensors["lm_head.w_out.weight"]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
                load_state_dict(directory, {"model": tensors})
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise UltraMemError(f"{directory} is damaged ({reason}); use an earlier checkpoint") from error
        check_finite_weights(model.state_dict(), directory)
        model.get_rope_buffers(self.config.data.sequence_length, place)  # computed once, for all shorter lengths too
        return model.eval().requires_grad_(False)


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's directory in the run directory, as in OLMo-core's trainer."""
    return f"step{step}"


def is_complete(directory: Path) -> bool:
    """Whether a checkpoint is complete."""
    return all((directory / part).is_file() for part in _PARTS)


def complete_steps(run: Path) -> list[int]:
    """Steps of a run's complete checkpoints, in ascending order."""
    named = ((path, re.fullmatch(r"step(\d+)", path.name)) for path in run.iterdir())
    return sorted(int(match[1]) for path, match in named if match and is_complete(path))


def find_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Find a checkpoint.

    Args:
        path: run directory, for its latest complete checkpoint, or a checkpoint's own directory.

    Raises:
        UltraMemError: there is no run, no such checkpoint, or it is not complete.
    """
    given = Path(path).absolute()
    run = given if (given / CONFIG_NAME).is_file() else given.parent
    if not (run / CONFIG_NAME).is_file():
        raise UltraMemError(
            f"{given} is neither a run directory, with a {CONFIG_NAME}, nor a checkpoint in one; give the "
            "trainer.directory of `ultramem train`"
        )
    steps = complete_steps(run)
    if not steps:
        raise UltraMemError(f"{run} has no complete checkpoint yet; wait for the first, or resume training")
    named = {checkpoint_name(step): step for step in steps}
    name = checkpoint_name(steps[-1]) if given == run else given.name
    if name not in named:
        fault = "is not a complete checkpoint" if given.exists() else "does not exist"
        raise UltraMemError(f"{given} {fault}; complete ones are {', '.join(named)}")
    return Checkpoint(run, named[name], load_config(run / CONFIG_NAME))


def load_model(path: str | os.PathLike[str], device: str = "auto") -> tuple[MemoryTransformer, RunConfig]:
    """Load the model of a checkpoint, in evaluation mode, and the configuration of its run.

    Args:
        path: as in `find_checkpoint`.
        device: as in `Checkpoint.load_model`.

    Raises:
        ConfigError, UltraMemError: as in `find_checkpoint` and `Checkpoint.load_model`.
    """
    checkpoint = find_checkpoint(path)
    return checkpoint.load_model(device), checkpoint.config
