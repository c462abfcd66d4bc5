"""Finding a run's checkpoints and loading their models."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ultramem.device import check_memory, choose_device
from ultramem.errors import UltraMemError
from ultramem.files.checksums import Checksums, DamagedFileError
from ultramem.files.owned import others_in, remove_ours
from ultramem.files.whole_files import TEMPORARY_NAME
from ultramem.hosts.olmo_core.checkpoint import METADATA_NAME, CheckpointReader, check_stored_model
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.hosts.olmo_core.sizes import bytes_to_load
from ultramem.hosts.weights import check_finite_weights
from ultramem.runs.config import RunConfig
from ultramem.runs.config_files import load_stored_config
from ultramem.runs.layout import CONFIG_NAME

# Files of a checkpoint of OLMo-core's trainer, which writes the last one at the end.
STEP_NAME = re.compile(r"step(0|[1-9][0-9]*)")
_PARTS = ("train/rank0.pt", METADATA_NAME, ".metadata.json")
# All files that it may have, also OLMo-core's temporary ones, and ours.
CONTENTS = re.compile(
    r"\.metadata\.json|checksums\.json|train/(rank[0-9]+\.pt)?|model_and_optim/(__[0-9]+_[0-9]+\.distcp|\.metadata)?"
    rf"|(train/|model_and_optim/)?(tmp[a-z0-9_]{{8}}(\.distcp|\.tmp)?|{TEMPORARY_NAME.pattern})"
)


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
        """Load the model, in evaluation mode and without gradients. Nothing in the checkpoint is run.

        Args:
            device: `cpu`, `cuda`, or `auto` for CUDA if available.

        Raises:
            ConfigError: the device is invalid, not available or too small for the model.
            UltraMemError: the checkpoint is damaged, holds more than data, has weights that are not finite, or does not
                match the run's configuration.
        """
        place = choose_device(device)
        directory = self.run / self.name
        check_memory(bytes_to_load(self.config.model), place)
        try:
            check_stored_model(directory, self.config.model)
            model = self.config.model.build("meta")
            model.to_empty(device=place)
            tensors = model.state_dict()
            if model.tie_word_embeddings:
                model.lm_head.w_out.weight = model.embeddings.weight
                del tensors["lm_head.w_out.weight"]
            CheckpointReader(directory).load({"model": tensors})
            if model.memory is not None:
                model.memory.check_loaded(tensors, "memory.")
        except DamagedFileError as error:
            raise UltraMemError(f"{error}; {self._alternative()}") from error
        check_finite_weights(model.state_dict(), directory)
        model.get_rope_buffers(self.config.data.sequence_length, place)  # computed once, for all shorter lengths too
        return model.eval().requires_grad_(False)

    def _alternative(self) -> str:
        earlier = [step for step in complete_steps(self.run) if step < self.step]
        good = next((step for step in reversed(earlier) if _is_undamaged(self.run / checkpoint_name(step))), None)
        if good is None:
            return "there is no good checkpoint before it"
        name = checkpoint_name(good)
        return f"use the one before it, {self.run / name}; training goes on from there with --from-checkpoint {name}"


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's directory in the run directory, as in OLMo-core's trainer."""
    return f"step{step}"


def is_complete(directory: Path) -> bool:
    """Whether a checkpoint is complete."""
    return all((directory / part).is_file() for part in _PARTS)


def _is_undamaged(directory: Path) -> bool:
    """Whether all files are as their checksums say; a checkpoint of version 0.1 has none."""
    try:
        checksums = Checksums.load(directory)
        if checksums is not None:
            checksums.check()
    except (UltraMemError, OSError):
        return False
    return True


def others_in_checkpoint(directory: Path) -> list[str]:
    """Names of what is no part of a checkpoint in its directory; see `owned.others_in`."""
    return others_in(directory, CONTENTS.fullmatch)


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint, complete or not; what is no part of it stays.

    Raises:
        OSError: a file cannot be removed.
    """
    remove_ours(directory, CONTENTS.fullmatch)
    if not any(directory.iterdir()):
        directory.rmdir()


def complete_steps(run: Path) -> list[int]:
    """Steps of a run's complete checkpoints, in ascending order."""
    named = ((path, STEP_NAME.fullmatch(path.name)) for path in run.iterdir())
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
    return Checkpoint(run, named[name], load_stored_config(run / CONFIG_NAME))


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
