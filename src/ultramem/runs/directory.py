"""The run directory: its owner, its contents, and their removal."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ultramem.configuration.decoding import encode
from ultramem.configuration.field_types import field_types
from ultramem.configuration.yaml_text import read_yaml
from ultramem.errors import ConfigError, UltraMemError, system_reason
from ultramem.files.directories import locked
from ultramem.files.json_files import parse_json
from ultramem.files.owned import divide, others_in, remove_ours
from ultramem.files.whole_files import TEMPORARY_NAME, check_output, write_text
from ultramem.hosts.olmo_core import ModelStatistics, model_statistics
from ultramem.hosts.olmo_core.sizes import bytes_of_state
from ultramem.runs.checkpoints import CONTENTS as CHECKPOINT_CONTENTS
from ultramem.runs.checkpoints import (
    STEP_NAME,
    checkpoint_name,
    complete_steps,
    is_complete,
    others_in_checkpoint,
    remove_checkpoint,
)
from ultramem.runs.config import RunConfig
from ultramem.runs.config_files import load_stored_config
from ultramem.runs.contents import DataContents, file_content, recorded_contents
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
from ultramem.runs.results import parse_report
from ultramem.runs.summary import DATA, EOS_TOKEN_ID, make_summary, read_summary
from ultramem.runs.tokens import TokenData

_FILES = (METRICS_NAME, TOKENIZER_NAME, EVALUATION_NAME, TASKS_NAME, SAMPLES_NAME, REPORT_NAME)
# What a run, or a tool on it, may have written, besides configuration and summary, which tell what run it is.
CONTENTS = re.compile(
    rf"{STEP_NAME.pattern}(-tmp)?/({CHECKPOINT_CONTENTS.pattern})?"
    rf"|{'|'.join(map(re.escape, _FILES))}"
    rf"|data_order/(global_indices_[^/]*\.npy(\.tmp)?|{TEMPORARY_NAME.pattern})?|{TEMPORARY_NAME.pattern}"
    r"|tensorboard/(events\.out\.tfevents\.[^/]*)?"
    r"|wandb/(wandb/)?((offline-)?run-[^/]*/.*|latest-run|debug[^/]*\.log)?"
)
CHECKPOINT_BYTES = 12  # per parameter: the weight and AdamW's two moments, in float32
# What a resumed run may change: where things are, how they are computed, what is reported; not what is learned.
CHANGEABLE = {
    "data.verify",
    "trainer.directory",
    "trainer.micro_batch_size",
    "trainer.precision",
    "trainer.device",
    "trainer.parallel",
    "trainer.compile",
    "trainer.cuda_graphs",
    "trainer.deterministic",
    "trainer.activation_checkpointing",
    "trainer.checkpoint_interval",
    "trainer.keep_checkpoints",
    "trainer.async_checkpoints",
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

    @cached_property
    def statistics(self) -> ModelStatistics:
        """Costs of the model."""
        return model_statistics(self.config.model, self.config.data.sequence_length)

    def find_step(self, overwrite: bool) -> int | None:
        """Check that the directory is free, or holds this run or one to replace, and find the step to go on from.

        Args:
            overwrite: whether to replace any run in it, including this one.

        Returns:
            the step of the latest complete checkpoint; None for a run that starts.

        Raises:
            UltraMemError: the directory holds another run's files.
        """
        if overwrite and self._holds_run():
            return None
        self._check_owner()
        return self.latest_step()

    def check_room(self, overwrite: bool) -> None:
        """Check that all files of the run can be written.

        Raises:
            UltraMemError: something is in the way of a file or a checkpoint, or there is too little space for one.
        """
        replaces = overwrite and self._holds_run()
        self._unneeded(replaces)
        check_output(self.path / CONFIG_NAME)
        for name in (SUMMARY_NAME, METRICS_NAME):
            check_output(self.path / name, lambda path: self._holds_run())
        logging = self.config.logging
        for name, needed in (("tensorboard", logging.tensorboard), ("wandb", logging.wandb)):
            if needed and os.path.lexists(self.path / name) and not (self.path / name).is_dir():
                raise UltraMemError(f"{self.path / name} is where a directory goes; rename it")
        self._check_space(replaces)

    def claim(self, overwrite: bool) -> int | None:
        """Check all this again, remove the run to replace or what a killed run left, and write the configuration.

        What we did not write is never removed. Until here, nothing is changed.

        Returns:
            as `find_step`.

        Raises:
            UltraMemError: as `find_step` and `check_room`.
        """
        step = self.find_step(overwrite)
        self.check_room(overwrite)
        if overwrite and self._holds_run():
            remove_ours(self.path, CONTENTS.fullmatch)
            for name in (SUMMARY_NAME, CONFIG_NAME):  # last: until then it can be seen that this is a run
                (self.path / name).unlink(missing_ok=True)
        else:
            for path in self._unneeded(replaces=False):
                remove_checkpoint(path)
            _cut_torn_line(self.path / METRICS_NAME)
        config = self.path / CONFIG_NAME
        if not config.exists() or load_stored_config(config) != self.config:  # it may be the user's own, with comments
            self.config.save(config)
        return step

    def others(self) -> list[str]:
        """Names of what we did not write in the directory; of a directory without its contents."""
        known = (CONFIG_NAME, SUMMARY_NAME)
        return others_in(self.path, lambda name: name in known or CONTENTS.fullmatch(name))

    def latest_step(self) -> int | None:
        """Step of the latest complete checkpoint."""
        return max(complete_steps(self.path), default=None)

    def step_before(self, step: int) -> int | None:
        """Step of the complete checkpoint before that of a step."""
        return max((earlier for earlier in complete_steps(self.path) if earlier < step), default=None)

    def step_of(self, name: str) -> int:
        """Step of a complete checkpoint.

        Args:
            name: its directory's name, such as `step400`.

        Raises:
            UltraMemError: there is no such checkpoint, or it is not complete.
        """
        named = {checkpoint_name(step): step for step in complete_steps(self.path)}
        if name not in named:
            valid = f"one of {', '.join(named)}" if named else "left out, as there is no complete checkpoint"
            raise UltraMemError(f"--from-checkpoint={name}: must be {valid} in {self.path}")
        return named[name]

    def put_aside(self, step: int, ending: str) -> list[str]:
        """Rename the checkpoints after a step, so that training can write theirs again.

        Args:
            step: step from which training goes on.
            ending: `damaged`, or `unused` if the user chose an earlier checkpoint. Then the metrics of later steps are
                put aside too.

        Returns:
            the new names.
        """
        later = [self.checkpoint(other) for other in complete_steps(self.path) if other > step]
        moved = [path.rename(_free_name(path, ending)) for path in later]
        metrics = self.path / METRICS_NAME
        if ending == "unused" and metrics.is_file():
            lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if not _is_later(line, step)]
            if len(kept) < len(lines):
                moved.append(shutil.copyfile(metrics, _free_name(metrics, ending)))
                write_text(metrics, "".join(kept))
        return [path.name for path in moved]

    def checkpoint(self, step: int) -> Path:
        """Path of the checkpoint of a step, which need not exist."""
        return self.path / checkpoint_name(step)

    def check_data(self, data: TokenData, contents: DataContents, overwrite: bool) -> None:
        """Check that the data and its tokenizer are those that the run began with, if it is not to be replaced.

        Raises:
            UltraMemError: they are not; the error names the file.
        """
        if overwrite and self._holds_run():
            return
        recorded, tokenizer = recorded_contents(self.path), self.path / TOKENIZER_NAME
        if recorded is not None:
            contents.check_same(data, recorded)
        if contents.tokenizer and tokenizer.exists() and not file_content(tokenizer).is_like(contents.tokenizer):
            raise UltraMemError(f"{tokenizer} is not that of the data, {data.tokenizer}; restore the right one")

    def describe(self, data: TokenData, contents: DataContents, device: torch.device, world_size: int) -> None:
        """Write `summary.json` and the tokenizer if they do not exist yet."""
        tokenizer = self.path / TOKENIZER_NAME
        if data.tokenizer is not None and not tokenizer.exists():
            write_text(tokenizer, data.tokenizer.read_bytes().decode())  # line ends as they are
        earlier = read_summary(self.path)
        if not earlier.keys() >= {EOS_TOKEN_ID, DATA}:  # also of a run that version 0.1 began
            summary = make_summary(self.config, data, self.statistics, device, world_size) | {DATA: asdict(contents)}
            write_text(self.path / SUMMARY_NAME, json.dumps(summary | earlier, indent=2) + "\n")

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
        remedy = "choose another directory with --trainer.directory=..."
        if not (self.path / CONFIG_NAME).is_file():
            ours = divide(self.path, CONTENTS.fullmatch)[0]
            files = [name for name in ours if not name.endswith("/") and not TEMPORARY_NAME.search(name)]
            if files:
                name = files[0].partition("/")[0]
                raise UltraMemError(
                    f"{self.path} has {name} but no {CONFIG_NAME}, which would tell what run it is; {remedy}"
                )
            return
        if self._holds_run():
            remedy += ", or replace that run with --overwrite"
        try:
            other = load_stored_config(self.path / CONFIG_NAME)
        except ConfigError as error:
            raise UltraMemError(f"{self.path} has a {CONFIG_NAME} that cannot be read ({error}); {remedy}") from error
        own, others = _flat(encode(self.config)), _flat(encode(other))
        different = [key for key in {**own, **others} if own.get(key) != others.get(key) and not _changeable(key)]
        if different:
            shown = ", ".join(f"{key}={others.get(key)} there, {own.get(key)} here" for key in different[:3])
            more = "" if len(different) <= 3 else f", and {len(different) - 3} more"
            raise UltraMemError(f"{self.path} holds another run ({shown}{more}); {remedy}")

    def _holds_run(self) -> bool:
        """Whether this is recognisably a run: it has the sections of a configuration, and what a run writes."""
        try:
            content = read_yaml(self.path / CONFIG_NAME)
        except ConfigError:
            return False
        sections = field_types(RunConfig).keys()
        is_config = isinstance(content, dict) and {"model", "data", "trainer"} <= content.keys() <= sections
        return is_config and (
            {"system", "parameters"} <= read_summary(self.path).keys()
            or _has_metrics(self.path / METRICS_NAME)
            or bool(complete_steps(self.path))
        )

    def _unneeded(self, replaces: bool) -> list[Path]:
        """Directories of checkpoints to remove: incomplete ones, or all of a run to replace.

        Raises:
            UltraMemError: one in the way of a checkpoint, or of those to remove, is not ours alone.
        """
        latest, unneeded = 0 if replaces else self.latest_step() or 0, []
        for path in sorted(self.path.iterdir()):
            match = STEP_NAME.fullmatch(path.name.removesuffix("-tmp"))
            if match is None or (not replaces and is_complete(path)):
                continue
            others = others_in_checkpoint(path)
            if not others:
                unneeded.append(path)
            elif replaces or latest < int(match[1]) <= self.config.trainer.total_steps:
                raise UltraMemError(
                    f"{path} is where a checkpoint goes, and {path / others[0]} is not of one; rename it or choose "
                    "another directory with --trainer.directory=..."
                )
        return unneeded

    def _check_space(self, replaces: bool) -> None:
        """Check that a checkpoint can fit."""
        needed = sum(bytes_of_state(self.config.model, CHECKPOINT_BYTES).values())
        free = shutil.disk_usage(self.path).free
        if replaces:
            free += sum((self.path / name).lstat().st_size for name in divide(self.path, CONTENTS.fullmatch)[0])
        if needed > free:
            raise UltraMemError(
                f"{self.path} has {free / 1e9:.3g} GB free, but a checkpoint of {self.statistics.total:,} parameters "
                f"needs {needed / 1e9:.3g} GB; free some space or choose another directory with --trainer.directory=..."
            )


def recorded_metrics(metrics_file: Path, step: int) -> dict[str, float]:
    """The metrics of a step in a run's `metrics.jsonl`, of which the last line counts; empty if there are none."""
    if not metrics_file.is_file():
        return {}
    with metrics_file.open(encoding="utf-8", errors="replace") as file:
        lines = (line for line in file if line.startswith(f'{{"step": {step},') and line.endswith("\n"))
        reports = [parse_report(line) for line in lines]
    return reports[-1][1] if reports and reports[-1] else {}


def _changeable(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)


def _flat(content: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{path}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return flat


def _free_name(path: Path, ending: str) -> Path:
    numbered = (path.with_name(f"{path.name}.{ending}{number}") for number in ("", *range(2, 10**6)))
    return next(name for name in numbered if not name.exists())


def _is_later(line: str, step: int) -> bool:
    try:
        return parse_json(line)["step"] > step
    except (ValueError, KeyError, TypeError):  # a damaged line stays where it is
        return False


def _has_metrics(path: Path) -> bool:
    """Whether a file begins as `metrics.jsonl` does."""
    try:
        with path.open(encoding="utf-8") as file:
            return parse_report(file.readline(2**20)) is not None
    except (OSError, ValueError):
        return False


def _cut_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which a killed process left."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
