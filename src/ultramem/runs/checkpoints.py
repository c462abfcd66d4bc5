"""Finding a run's checkpoints and loading the model of one."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from olmo_core.distributed.checkpoint import load_state_dict
from torch.distributed.checkpoint.api import CheckpointException

from ultramem.device import choose_device
from ultramem.errors import UltraMemError
from ultramem.hosts.olmo_core.checkpoint import check_stored_model
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.runs.config import RunConfig
from ultramem.runs.config_files import load_config
from ultramem.runs.layout import CONFIG_NAME

# What OLMo-core's trainer writes into a checkpoint, the last of it when all else is there.
MODEL_NAME = "model_and_optim"
_PARTS = ("train/rank0.pt", f"{MODEL_NAME}/.metadata", ".metadata.json")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a training run.

    Attributes:
        run: the run directory, an absolute path.
        step: training step after which it was written.
        config: of the run.
    """

    run: Path
    step: int
    config: RunConfig

    @property
    def name(self) -> str:
        """Name of the checkpoint's directory within the run's."""
        return checkpoint_name(self.step)

    def load_model(self, device: str = "auto") -> MemoryTransformer:
        """The model in evaluation mode, without gradients; all parameters and buffers are the checkpoint's.

        The distributed checkpoints of PyTorch and OLMo-core hold pickles: load only what you trust.

        Args:
            device: `cpu`, `cuda`, or `auto` for CUDA where there is a device.

        Raises:
            ConfigError: there is no such device.
            UltraMemError: the checkpoint is damaged, or of a model that the run's configuration does not describe.
        """
        place = choose_device(device)
        directory = self.run / self.name / MODEL_NAME
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
        model.get_rope_buffers(self.config.data.sequence_length, place)  # computed once, for all shorter lengths too
        return model.eval().requires_grad_(False)


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's directory within the run's, as OLMo-core's trainer calls it."""
    return f"step{step}"


def is_complete(directory: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return all((directory / part).is_file() for part in _PARTS)


def complete_steps(run: Path) -> list[int]:
    """Steps of a run's complete checkpoints, rising."""
    named = ((path, re.fullmatch(r"step(\d+)", path.name)) for path in run.iterdir())
    return sorted(int(match[1]) for path, match in named if match and is_complete(path))


def find_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at `path`: a run directory for its latest complete one, or a checkpoint's own directory.

    Raises:
        UltraMemError: there is no run, no such checkpoint, or it was not written to its end.
    """
    given = Path(path).absolute()
    run = given if (given / CONFIG_NAME).is_file() else given.parent
    if not (run / CONFIG_NAME).is_file():
        raise UltraMemError(
            f"{given} is neither a run directory, with a {CONFIG_NAME}, nor a checkpoint in one; "
            "name the directory that `ultramem train` writes its run to"
        )
    steps = complete_steps(run)
    if not steps:
        raise UltraMemError(f"{run} has no complete checkpoint yet; wait for the first, or train further")
    named = {checkpoint_name(step): step for step in steps}
    name = checkpoint_name(steps[-1]) if given == run else given.name
    if name not in named:
        fault = "is not a complete checkpoint" if given.exists() else "does not exist"
        raise UltraMemError(f"{given} {fault}; the complete ones are {', '.join(named)}")
    return Checkpoint(run, named[name], load_config(run / CONFIG_NAME))


def load_model(path: str | os.PathLike[str], device: str = "auto") -> tuple[MemoryTransformer, RunConfig]:
    """The model of a checkpoint, in evaluation mode, and the configuration of its run.

    Args:
        path: as in `find_checkpoint`.
        device: as in `Checkpoint.load_model`.

    Raises:
        ConfigError, UltraMemError: as in these two.
    """
    checkpoint = find_checkpoint(path)
    return checkpoint.load_model(device), checkpoint.config
