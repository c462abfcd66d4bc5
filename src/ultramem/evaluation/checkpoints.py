"""Finding a run's checkpoints and loading the model of one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from olmo_core.distributed.checkpoint import get_checkpoint_metadata
from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemReader
from olmo_core.train.checkpoint import Checkpointer
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from ultramem.errors import UltraMemError
from ultramem.evaluation.device import choose_device
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.training.config import RunConfig, load_config

CONFIG_NAME = "config.yaml"


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
        return Checkpointer.checkpoint_dirname(self.step)

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
        model = self.config.model.build("meta")
        model.to_empty(device=place)
        tensors = model.state_dict()
        if model.tie_word_embeddings:
            model.lm_head.w_out.weight = model.embeddings.weight
            del tensors["lm_head.w_out.weight"]
        self._read(tensors)
        model.get_rope_buffers(self.config.data.sequence_length, place)  # computed once, for all shorter lengths too
        return model.eval().requires_grad_(False)

    def _read(self, tensors: dict[str, Tensor]) -> None:
        """Fill the model's tensors."""
        directory = self.run / self.name / "model_and_optim"
        try:
            stored = get_checkpoint_metadata(directory).state_dict_metadata
        except Exception as error:
            raise _damaged(directory, error) from error
        sizes = {name.removeprefix("model."): entry.size for name, entry in stored.items() if name.startswith("model.")}
        if difference := _first_difference(tensors, sizes):
            raise UltraMemError(
                f"{directory} is not of the model that {self.run / CONFIG_NAME} describes: {difference}; "
                f"put back the {CONFIG_NAME} of its training"
            )
        try:
            # One process reads all, whether or not others train beside it.
            load({"model": tensors}, storage_reader=RemoteFileSystemReader(str(directory)), no_dist=True)
        except Exception as error:
            raise _damaged(directory, error) from error


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
    steps = sorted(step for step, _ in Checkpointer.find_checkpoints(run))
    if not steps:
        raise UltraMemError(f"{run} has no complete checkpoint yet; wait for the first, or train further")
    if given == run:
        step = steps[-1]
    else:
        named = {Checkpointer.checkpoint_dirname(step): step for step in steps}
        if given.name not in named:
            fault = "is not a complete checkpoint" if given.exists() else "does not exist"
            raise UltraMemError(f"{given} {fault}; the complete ones are {', '.join(named)}")
        step = named[given.name]
    return Checkpoint(run, step, load_config(run / CONFIG_NAME))


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


def _first_difference(tensors: dict[str, Tensor], sizes: dict[str, torch.Size]) -> str | None:
    for name, tensor in tensors.items():
        if name not in sizes:
            return f"it lacks {name}"
        if tensor.shape != sizes[name]:
            return f"{name} has the shape {tuple(sizes[name])}, not {tuple(tensor.shape)}"
    surplus = sizes.keys() - tensors.keys() - {"lm_head.w_out.weight"}  # stored also where it is tied
    return f"it has {min(surplus)} as well" if surplus else None


def _damaged(directory: Path, error: Exception) -> UltraMemError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UltraMemError(f"{directory} is damaged ({reason}); use an earlier checkpoint")
