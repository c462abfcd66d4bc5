"""Reading a run directory of `ultramem train`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ultramem.configuration.decoding import decode
from ultramem.configuration.field_types import check_range, check_types, field_types
from ultramem.errors import ConfigError, UltraMemError
from ultramem.files.json_files import damaged, read_json
from ultramem.runs.layout import CONFIG_NAME, EVALUATION_NAME, METRICS_NAME, SAMPLES_NAME, SUMMARY_NAME, TASKS_NAME
from ultramem.runs.results import LossResult, TaskResult, parse_report

Array = NDArray[np.float64]
T = TypeVar("T")

_PROVENANCE = {
    "started": "Started",
    "device": "Device",
    "world_size": "Processes",
    "torch": "PyTorch",
    "git": "Git revision",
}
_LAYER_METRIC = re.compile(r"(?P<group>[^/]+)/(?P<axis>layer|block) (?P<index>[0-9]{1,9})/(?P<name>.+)")


@dataclass(frozen=True)
class Series:
    """A metric over the run: the steps of its reports, (n,), ascending, and its values, (n,)."""

    steps: Array
    values: Array

    def __len__(self) -> int:
        """Number of reports."""
        return len(self.steps)


@dataclass(frozen=True)
class LayerSeries:
    """A metric that all layers of a kind report.

    Attributes:
        group: first part of the metric's name, such as "memory" or "moe".
        axis: what is numbered: "layer" (of the memory) or "block" (of the model).
        name: last part of the metric's name, such as "rows read".
        layers: numbers of the reporting layers, ascending.
        steps: (n,), steps at which any layer reported, ascending.
        values: (len(layers), n), values; NaN where a layer did not report.
    """

    group: str
    axis: str
    name: str
    layers: list[int]
    steps: Array
    values: Array


@dataclass(frozen=True)
class Parameters:
    """Counts of the model's parameters."""

    total: int
    active: int
    total_without_embeddings: int
    active_without_embeddings: int

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, *field_types(Parameters), least=0)


@dataclass(frozen=True)
class MemorySizes:
    """Rows of all tables and of a layer's window, and number of memory layers."""

    table_rows: int
    window_rows: int
    layers: int

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, *field_types(MemorySizes), least=0)


@dataclass(frozen=True)
class Summary:
    """The content of `summary.json`."""

    system: str
    parameters: Parameters
    flops_per_token: int
    bytes_per_token: int
    memory: MemorySizes | None = None
    train_tokens: int | None = None
    started: str | None = None
    device: str | None = None
    world_size: int | None = None
    torch: str | None = None
    git: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "flops_per_token", "bytes_per_token", "train_tokens", "world_size", least=0)

    @property
    def provenance(self) -> dict[str, str | int]:
        """What is known of where and when the run was made, by label."""
        return {label: value for name, label in _PROVENANCE.items() if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Tasks:
    """The content of `tasks.json`."""

    checkpoint: str
    results: tuple[TaskResult, ...]

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class ReportedSample:
    """An entry of `samples.json`: a prompt, the text including it, and the sampling settings."""

    prompt: str
    text: str
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def continuation(self) -> str:
        """The text without its prompt."""
        return self.text.removeprefix(self.prompt)

    @property
    def settings(self) -> dict[str, float]:
        """The sampling settings by label."""
        names = {"temperature": "temperature", "top_k": "top-k", "top_p": "top-p", "seed": "seed"}
        return {label: value for name, label in names.items() if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Samples:
    """The content of `samples.json`."""

    entries: tuple[ReportedSample, ...]

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        path: absolute path of the run directory.
        config: text of `config.yaml`.
        summary: content of `summary.json`.
        metrics: metrics by step, ascending; a step that was repeated after a resume has its last report.
        unreadable_lines: number of incomplete lines of `metrics.jsonl`, which a crash left, without the last line.
        evaluation: content of `evaluation.json`, None without that file or if it is not on the run's own held-out data.
        tasks: content of `tasks.json`, None without that file.
        samples: content of `samples.json`, empty without that file.
    """

    path: Path
    config: str
    summary: Summary
    metrics: dict[int, dict[str, float]]
    unreadable_lines: int
    evaluation: LossResult | None
    tasks: Tasks | None
    samples: tuple[ReportedSample, ...]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read the directory at `path`.

        Raises UltraMemError if the directory is not a run, has no metrics yet, or has an invalid file.
        """
        path = Path(os.path.realpath(path))
        if not path.exists():
            raise UltraMemError(f"{path} does not exist; give the trainer.directory of `ultramem train`")
        for name in (CONFIG_NAME, SUMMARY_NAME):
            if not (path / name).is_file():
                raise UltraMemError(
                    f"{path} is not a run directory, as it has no {name}; give the trainer.directory of "
                    "`ultramem train`"
                )
        metrics, unreadable_lines = _read_metrics(path / METRICS_NAME)
        losses, tasks, samples = (path / name for name in (EVALUATION_NAME, TASKS_NAME, SAMPLES_NAME))
        evaluation = _load(LossResult, losses) if losses.is_file() else None
        return cls(
            path=path,
            config=(path / CONFIG_NAME).read_text(encoding="utf-8", errors="replace"),
            summary=_load(Summary, path / SUMMARY_NAME),
            metrics=metrics,
            unreadable_lines=unreadable_lines,
            evaluation=evaluation if evaluation is not None and evaluation.of_run else None,
            tasks=_load(Tasks, tasks) if tasks.is_file() else None,
            samples=_load(Samples, samples, "entries").entries if samples.is_file() else (),
        )

    @property
    def last_step(self) -> int:
        """The last step with a report."""
        return next(reversed(self.metrics))

    def series(self, name: str) -> Series:
        """The metric called `name`; empty if the run does not report it."""
        points = [(step, values[name]) for step, values in self.metrics.items() if name in values]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return Series(steps, values)

    @cached_property
    def layer_series(self) -> list[LayerSeries]:
        """All metrics that layers report, in order of first appearance."""
        points: dict[tuple[str, str, str], list[tuple[int, int, float]]] = {}
        for step, values in self.metrics.items():
            for full_name, value in values.items():
                if match := _LAYER_METRIC.fullmatch(full_name):
                    metric = points.setdefault((match["group"], match["axis"], match["name"]), [])
                    metric.append((int(match["index"]), step, value))
        return [_layer_series(*key, metric) for key, metric in points.items()]


def _layer_series(group: str, axis: str, name: str, points: list[tuple[int, int, float]]) -> LayerSeries:
    """Arrange (layer, step, value) triples in a layer × step grid."""
    layer_of_point, step_of_point, value_of_point = zip(*points, strict=True)
    layers, row = np.unique(layer_of_point, return_inverse=True)
    steps, column = np.unique(step_of_point, return_inverse=True)
    values = np.full((len(layers), len(steps)), np.nan)
    values[row, column] = value_of_point
    return LayerSeries(group, axis, name, layers.tolist(), steps.astype(np.float64), values)


def _read_metrics(path: Path) -> tuple[dict[int, dict[str, float]], int]:
    """Metrics by ascending step, and the number of unreadable lines before the last."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    reports = [parse_report(line) for line in lines]
    metrics = dict(report for report in reports if report is not None)
    if not any(metrics.values()):
        raise UltraMemError(
            f"{path.parent} has no metrics yet, as the run has just started; try again after its first report"
        )
    return dict(sorted(metrics.items())), reports[:-1].count(None)


def _load(kind: type[T], path: Path, field: str | None = None) -> T:
    """Read a JSON file into a dataclass, or into one of its fields."""
    remedy = "write it again or remove it"
    content = read_json(path, remedy)
    try:
        return decode(kind, content if field is None else {field: content})
    except ConfigError as error:
        raise damaged(path, error, remedy) from error
