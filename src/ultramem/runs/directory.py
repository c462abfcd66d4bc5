"""The run directory: its owner, its contents, and their removal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ultramem.configuration.decoding import encode
from ultramem.errors import ConfigError, UltraMemError, system_reason
from ultramem.files.directories import locked, remove
from ultramem.files.whole_files import write_text
from ultramem.hosts.olmo_core import ModelStatistics, model_statistics
from ultramem.runs.checkpoints import checkpoint_name, complete_steps, is_complete
from ultramem.runs.config import RunConfig
from ultramem.runs.config_files import load_config
from ultramem.runs.layout import (
    CONFIG_NAME,
    EVALUATION_NAME,
    HELD_OUT_METRICS,
    METRICS_NAME,
    REPORT_NAME,
    SAMPLES_NAME,
    SUMMARY_NAME,
    TASK_METRICS,
    TASKS_NAME,
    TOKENIZER_NAME,
)
from ultramem.runs.summary import EOS_TOKEN_ID, make_summary, read_summary
from ultramem.runs.tokens import TokenData

# Everything that a run, or a tool on it, may have written. The configuration is last: it tells which run it is.
CONTENTS = (
    "step[0-9]*",
    METRICS_NAME,
    SUMMARY_NAME,
    TOKENIZER_NAME,
    "data_order",
    "tensorboard",
    "wandb",
    EVALUATION_NAME,
    TASKS_NAME,
    SAMPLES_NAME,
    REPORT_NAME,
    CONFIG_NAME,
)
# What a resumed run may change: where things are, how they are computed, what is reported; not what is learned.
CHANGEABLE = {
    "trainer.directory",
    "trainer.micro_batch_size",
    "trainer.precision",
    "trainer.device",
    "trainer.parallel",
    "trainer.compile",
    "trainer.deterministic",
    "trainer.activation_checkpointing",
    "trainer.checkpoint_interval",
    "trainer.keep_checkpoints",
    "trainer.metrics_interval",
    "trainer.memory_metrics_interval",
    "trainer.evaluate_interval",
    "trainer.evaluate_tokens",
    "trainer.evaluate_tasks",
    "trainer.evaluate_tasks_interval",
    "trainer.evaluate_tasks_questions",
    "logging.tensorboard",
    "logging.wandb",
}


class RunDirectory:
    """The directory of a run. Only one process writes to it, except for checkpoints.

    Args:
        config: configuration of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = config.trainer.directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory if needed and hold a lock on it. The system releases it, however the process ends.

        Raises:
            UltraMemError: another process is training in the directory, or it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UltraMemError(
                f"trainer.directory={self.path}: cannot be created ({system_reason(error)}); choose another directory"
            ) from error
        with locked(self.path, f"another process is training in {self.path}; wait for it, or choose another directory"):
            yield

    def claim(self, overwrite: bool) -> int | None:
        """Check that the directory is free or holds this run, and remove what a killed run left incomplete.

        Args:
            overwrite: whether to remove the files of any run in it, including this one, and start again.

        Returns:
            the step of the latest complete checkpoint; None for a new run.

        Raises:
            UltraMemError: the directory holds another run's files.
        """
        if overwrite:
            self._clear()
        self._check_owner()
        for path in self.path.glob("step[0-9]*"):
            if path.is_dir() and not is_complete(path):
                shutil.rmtree(path)
        _cut_torn_line(self.path / METRICS_NAME)
        self.config.save(self.path / CONFIG_NAME)
        return self.latest_step()

    def latest_step(self) -> int | None:
        """Step of the latest complete checkpoint."""
        return max(complete_steps(self.path), default=None)

    def checkpoint(self, step: int) -> Path:
        """Path of the checkpoint of a step, which need not exist."""
        return self.path / checkpoint_name(step)

    def describe(self, data: TokenData, device: torch.device, world_size: int) -> ModelStatistics:
        """Write `summary.json` and the tokenizer if they do not exist yet, and return the model's statistics."""
        statistics = model_statistics(self.config.model, self.config.data.sequence_length)
        tokenizer = self.path / TOKENIZER_NAME
        if data.tokenizer is not None and not tokenizer.exists():
            write_text(tokenizer, data.tokenizer.read_text(encoding="utf-8"))
        earlier = read_summary(self.path)
        if EOS_TOKEN_ID not in earlier:  # also of a run that version 0.1 began
            summary = make_summary(self.config, data, statistics, device, world_size)
            write_text(self.path / SUMMARY_NAME, json.dumps(summary | earlier, indent=2) + "\n")
        return statistics

    def is_finished(self, step: int | None, has_heldout: bool) -> bool:
        """Whether a step is the last one, and the evaluations that are due after it are in the metrics.

        Args:
            step: step of the latest checkpoint.
            has_heldout: whether the run has held-out data.
        """
        if step is None or step != self.config.trainer.total_steps:
            return False
        trainer, recorded = self.config.trainer, recorded_metrics(self.path / METRICS_NAME, step)
        due = {HELD_OUT_METRICS: has_heldout and trainer.evaluate_interval is not None}
        due[TASK_METRICS] = bool(trainer.evaluate_tasks)
        return all(any(name.startswith(prefix) for name in recorded) for prefix, wanted in due.items() if wanted)

    def _check_owner(self) -> None:
        if not (self.path / CONFIG_NAME).is_file():
            foreign = sorted(path.name for pattern in CONTENTS for path in self.path.glob(pattern))
            if foreign:
                raise UltraMemError(
                    f"{self.path} has {foreign[0]} but no {CONFIG_NAME}, which would tell what run it is; choose "
                    "another directory with --trainer.directory=..."
                )
            return
        remedy = "choose another directory with --trainer.directory=..., or replace that run with --overwrite"
        try:
            other = load_config(self.path / CONFIG_NAME)
        except ConfigError as error:
            raise UltraMemError(
                f"{self.path} holds a run whose configuration cannot be read ({error}); {remedy}"
            ) from error
        own, others = _flat(encode(self.config)), _flat(encode(other))
        different = [key for key in {**own, **others} if own.get(key) != others.get(key) and not _changeable(key)]
        if different:
            shown = ", ".join(f"{key}={others.get(key)} there, {own.get(key)} here" for key in different[:3])
            more = "" if len(different) <= 3 else f", and {len(different) - 3} more"
            raise UltraMemError(f"{self.path} holds another run ({shown}{more}); {remedy}")

    def _clear(self) -> None:
        if not (self.path / CONFIG_NAME).is_file():
            return  # what is not a run is never removed
        for pattern in CONTENTS:
            for path in self.path.glob(pattern):
                remove(path)


def recorded_metrics(metrics_file: Path, step: int) -> dict[str, float]:
    """The metrics of a step in a run's `metrics.jsonl`, of which the last line counts; empty if there are none."""
    if not metrics_file.is_file():
        return {}
    with metrics_file.open(encoding="utf-8") as file:
        lines = [line for line in file if line.startswith(f'{{"step": {step},')]
    return json.loads(lines[-1])["metrics"] if lines else {}


def _changeable(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)


def _flat(content: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{path}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return flat


def _cut_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which a killed process left."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
