"""Reading a run directory of `ultramem train`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ultramem.errors import UltraMemError
from ultramem.runs.layout import CONFIG_NAME, EVALUATION_NAME, METRICS_NAME, SAMPLES_NAME, SUMMARY_NAME, TASKS_NAME
from ultramem.runs.results import LossResult, TaskResult

Array = NDArray[np.float64]
Parsed = TypeVar("Parsed")

_PROVENANCE = {
    "started": "Started",
    "device": "Device",
    "world_size": "Processes",
    "torch": "PyTorch",
    "git": "Git revision",
}
_LAYER_METRIC = re.compile(r"(?P<group>[^/]+)/(?P<axis>layer|block) (?P<index>\d+)/(?P<name>.+)")


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
class Summary:
    """The content of `summary.json`; parameters, rows and tokens are counts."""

    system: str
    total: int
    active: int
    total_without_embeddings: int
    active_without_embeddings: int
    flops_per_token: int
    bytes_per_token: int
    memory: dict[str, int] | None
    train_tokens: int | None
    provenance: dict[str, str]

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Summary:
        """Parse the content of the file."""
        parameters, memory = content["parameters"], content.get("memory")
        tokens = content.get("train_tokens")
        counts = ("total", "active", "total_without_embeddings", "active_without_embeddings")
        return cls(
            system=str(content["system"]),
            **{name: int(parameters[name]) for name in counts},
            flops_per_token=int(content["flops_per_token"]),
            bytes_per_token=int(content["bytes_per_token"]),
            memory=memory and {name: int(memory[name]) for name in ("table_rows", "window_rows", "layers")},
            train_tokens=None if tokens is None else int(tokens),
            provenance={label: str(content[key]) for key, label in _PROVENANCE.items() if content.get(key) is not None},
        )


@dataclass(frozen=True)
class Tasks:
    """The content of `tasks.json`."""

    checkpoint: str
    results: list[TaskResult]

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Tasks:
        """Parse the content of the file."""
        return cls(str(content["checkpoint"]), [TaskResult.parse(result) for result in content["results"]])


@dataclass(frozen=True)
class ReportedSample:
    """A prompt, the model's continuation, and the sampling settings."""

    prompt: str
    continuation: str
    settings: dict[str, float]

    @classmethod
    def parse(cls, content: dict[str, Any]) -> ReportedSample:
        """Parse an entry of `samples.json`."""
        names = {"temperature": "temperature", "top_k": "top-k", "top_p": "top-p", "seed": "seed"}
        return cls(
            prompt=content["prompt"],
            continuation=content["text"].removeprefix(content["prompt"]),
            settings={label: content[name] for name, label in names.items() if content.get(name) is not None},
        )


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        path: absolute path of the run directory.
        config: text of `config.yaml`.
        summary: content of `summary.json`.
        metrics: metrics by step, ascending; a step that was repeated after a resume has its last report.
        unreadable_lines: number of incomplete lines of `metrics.jsonl`, which a crash left, without the last line.
        evaluation: content of `evaluation.json`, None without that file.
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
    samples: list[ReportedSample]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read the directory at `path`.

        Raises UltraMemError if the directory is not a run, has no metrics yet, or has an invalid file.
        """
        path = path.resolve()
        for name in (CONFIG_NAME, SUMMARY_NAME):
            if not (path / name).is_file():
                raise UltraMemError(
                    f"{path} is not a run directory, as it has no {name}; give the trainer.directory of "
                    "`ultramem train`"
                )
        metrics, unreadable_lines = _read_metrics(path / METRICS_NAME)
        evaluation, tasks, samples = (path / name for name in (EVALUATION_NAME, TASKS_NAME, SAMPLES_NAME))
        return cls(
            path=path,
            config=(path / CONFIG_NAME).read_text(encoding="utf-8", errors="replace"),
            summary=_parse(path / SUMMARY_NAME, Summary.parse),
            metrics=metrics,
            unreadable_lines=unreadable_lines,
            evaluation=_parse(evaluation, LossResult.parse) if evaluation.is_file() else None,
            tasks=_parse(tasks, Tasks.parse) if tasks.is_file() else None,
            samples=_parse(samples, lambda entries: [ReportedSample.parse(entry) for entry in entries])
            if samples.is_file()
            else [],
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
    reports = [_parse_report(line) for line in lines]
    metrics = dict(report for report in reports if report is not None)
    if not any(metrics.values()):
        raise UltraMemError(
            f"{path.parent} has no metrics yet, as the run has just started; try again after its first report"
        )
    return dict(sorted(metrics.items())), reports[:-1].count(None)


def _parse_report(line: str) -> tuple[int, dict[str, float]] | None:
    """Step and metrics of one line of `metrics.jsonl`; None if it is unreadable."""
    try:
        report = json.loads(line)
        metrics = report["metrics"].items()
        return int(report["step"]), {name: float(value) for name, value in metrics if isinstance(value, int | float)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _parse(path: Path, parse: Callable[[Any], Parsed]) -> Parsed:
    """Read a JSON file and parse its content with `parse`."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise UltraMemError(f"{path} is not valid ({error}); write it again or remove it") from error
    except KeyError as error:
        raise UltraMemError(f"{path} lacks {error}; write it again or remove it") from error
