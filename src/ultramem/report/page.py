"""The report's HTML pages: one for a single run, one for a comparison."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ultramem.configuration.yaml_text import parse_yaml
from ultramem.errors import UltraMemError
from ultramem.files.whole_files import cannot_write, check_output, write_text
from ultramem.report import plots
from ultramem.report.run import Array, LayerSeries, Run, Series
from ultramem.runs.layout import (
    CONFIG_NAME,
    GRADIENT_NORM,
    HELD_OUT,
    LEARNING_RATES,
    REPORT_NAME,
    THROUGHPUT,
    TOKENS,
    TRAIN_LOSS,
)
from ultramem.runs.results import TaskResult

GROUPS = {"memory": "Memory layers", "moe": "Mixture of experts"}
# Label of the colour bar and explanation of each layer metric; others are shown without.
LAYER_METRICS = {
    "rows read": ("share of rows", "share of the window's rows that were read since the last report"),
    "KL from uniform": ("nats", "KL divergence of the reads from uniform; 0 if all rows are read equally often"),
    "output std": ("standard deviation", "of the layer's output, which is added to the residual stream"),
    "top score": ("score", "highest score among a token's rows, mean over tokens"),
    "last score": ("score", "lowest score among a token's rows, mean over tokens"),
    "singular value 1": ("singular value", "largest singular value of the summed Tucker cores"),
    "singular value 2": ("singular value", "second singular value of the summed Tucker cores"),
    "load balancing loss": ("loss", "mean over tokens, without its weight"),
    "router Z loss": ("loss", "mean over tokens, without its weight"),
    "load imbalance": ("imbalance", "load of the busiest expert over the mean load"),
}


@dataclass(frozen=True)
class Tile:
    """A figure at the top of the page: label, exact value, formatted value and note."""

    label: str
    value: float
    text: str
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing with its caption."""

    title: str
    drawing: Markup
    explanation: str = ""


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write a self-contained HTML report of a run directory, or a comparison of several, and return its path.

    The `output` is by default, for a single run only, `report.html` in its directory.

    Raises:
        UltraMemError: a directory is not a run, has no metrics yet or has an invalid file; `output` is missing for
            several runs; or the page cannot be written.
    """
    paths = list(dict.fromkeys(Path(os.path.realpath(path)) for path in runs))
    if not paths:
        raise UltraMemError("no run to report on; give at least one run directory")
    if output is None:
        if len(paths) > 1:
            raise UltraMemError("a comparison of runs needs a file to write; give it with --output FILE")
        output = paths[0] / REPORT_NAME
    read = [Run.read(path) for path in paths]
    check_output(output, lambda path: b" ultramem</title>" in path.read_bytes()[: 2**16])
    page = _run_page(read[0]) if len(read) == 1 else _comparison_page(read)
    with cannot_write(output):
        write_text(output, page)
    return output


def abbreviate(value: float, prefixes: Sequence[str] = ("", "k", "M", "B", "T")) -> str:
    """Format a number with three significant digits and a prefix: 1180000000 as "1.18 B"."""
    position = 0
    while abs(value) >= 999.5 and position < len(prefixes) - 1:
        value, position = value / 1000, position + 1
    digits = f"{value:#.3g}".rstrip(".") if position else f"{value:.3g}"
    return f"{digits} {prefixes[position]}".rstrip()


def in_unit(value: float, unit: str) -> str:
    """Format a quantity with its unit: 4520000 B as "4.52 MB"."""
    return abbreviate(value, [prefix + unit for prefix in ("", "k", "M", "G", "T", "P")])


def held_out(run: Run, figure: str) -> float | None:
    """The `figure` of the final evaluation, else the last one of training, else None."""
    if run.evaluation is not None:
        value = getattr(run.evaluation, figure)
        return None if value is None else float(value)
    return _last(run.series(HELD_OUT[figure]).values)


def final_loss(run: Run) -> float | None:
    """The smoothed training loss at the last step, in nats per token."""
    return _last(plots.smooth(run.series(TRAIN_LOSS).values))


def _last(values: Array) -> float | None:
    return float(values[-1]) if len(values) else None


def throughput(run: Run) -> float | None:
    """Median of the reported tokens per second."""
    values = run.series(THROUGHPUT).values
    return float(np.median(values)) if len(values) else None


def _run_page(run: Run) -> str:
    layer_plots: dict[str, list[Plot]] = {}
    for metric in run.layer_series:
        layer_plots.setdefault(GROUPS.get(metric.group, metric.group), []).append(_heat_map(metric))
    return _render(
        "run.html", title=run.path.name, run=run, tiles=_tiles(run), curves=_curves(run), layer_plots=layer_plots
    )


def _tiles(run: Run) -> list[Tile]:
    """Tiles of loss, speed, parameters, operations and bytes; figures that were not measured are left out."""
    summary, parameters, decimals = run.summary, run.summary.parameters, "{:.3f}".format
    bits, loss, perplexity = (held_out(run, figure) for figure in ("bits_per_byte", "loss", "perplexity"))
    unigram = run.evaluation and run.evaluation.unigram_bits_per_byte
    trained = f"{abbreviate(summary.train_tokens)} training tokens" if summary.train_tokens else ""
    active = f"{abbreviate(parameters.active_without_embeddings)} without embeddings"
    total = f"{abbreviate(parameters.total_without_embeddings)} without embeddings"
    figures: list[tuple[str, float | None, Callable[[float], str], str]] = [
        ("Held-out bits per byte", bits, decimals, f"unigram model: {unigram:.3f}" if unigram else ""),
        ("Held-out loss", loss, decimals, f"perplexity {perplexity:.4g}" if perplexity is not None else ""),
        ("Training loss", final_loss(run), decimals, "at the last step, smoothed"),
        ("Tokens per second", throughput(run), abbreviate, "median"),
        ("Last step", run.last_step, "{:,}".format, trained),
        ("Active parameters", parameters.active, abbreviate, active),
        ("Total parameters", parameters.total, abbreviate, total),
        ("FLOPs per token", summary.flops_per_token, partial(in_unit, unit="FLOP"), "forward, active"),
        ("Read per token", summary.bytes_per_token, partial(in_unit, unit="B"), "bf16, batch of one"),
    ]
    if memory := summary.memory:
        note = f"{memory.layers} layers, {abbreviate(memory.window_rows)} in each window"
        figures.append(("Memory rows", memory.table_rows, abbreviate, note))
    return [Tile(label, value, write(value), note) for label, value, write, note in figures if value is not None]


def _curves(run: Run) -> list[Plot]:
    """Plots over steps of the metrics that the run has."""
    curves = []
    if loss := run.series(TRAIN_LOSS):
        drawing = plots.svg(plots.draw_loss, "Loss by step", loss, run.series(HELD_OUT["loss"]))
        curves.append(Plot("Loss", drawing))
    if rates := {group: rate for group, name in LEARNING_RATES.items() if (rate := run.series(name))}:
        description = "Learning rate of each parameter group by step"
        curves.append(Plot("Learning rates", plots.svg(plots.draw_learning_rates, description, rates)))
    if norm := run.series(GRADIENT_NORM):
        drawing = plots.svg(plots.draw_gradient_norm, "Gradient norm by step", norm)
        curves.append(Plot("Gradient norm", drawing, "before clipping"))
    if rate := run.series(THROUGHPUT):
        curves.append(Plot("Throughput", plots.svg(plots.draw_throughput, "Tokens per second by step", rate)))
    return curves


def _heat_map(metric: LayerSeries) -> Plot:
    unit, explanation = LAYER_METRICS.get(metric.name, (metric.name, ""))
    title = metric.name[0].upper() + metric.name[1:]
    drawing = plots.svg(plots.draw_heat_map, f"{title} by {metric.axis} and step", metric, unit)
    return Plot(title, drawing, explanation)


def _comparison_page(runs: list[Run]) -> str:
    names = [run.path.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    return _render(
        "comparison.html",
        title="Comparison of " + ", ".join(names),
        runs=[_comparison_row(run, name, index) for index, (run, name) in enumerate(zip(runs, names, strict=True))],
        curves=_comparison_curves(runs),
        tasks=_compared_tasks(runs),
        differences=_config_differences(runs),
    )


def _comparison_row(run: Run, name: str, index: int) -> dict[str, Any]:
    color, line_style = plots.curve_style(index)
    return {
        "name": name,
        "path": run.path,
        "color": plots.page_color(color),
        "line_style": line_style,
        "summary": run.summary,
        "last_step": run.last_step,
        "bits_per_byte": held_out(run, "bits_per_byte"),
        "held_out_loss": held_out(run, "loss"),
        "train_loss": final_loss(run),
        "throughput": throughput(run),
        "tasks_checkpoint": run.tasks and run.tasks.checkpoint,
    }


def _compared_tasks(runs: list[Run]) -> dict[tuple[str, str], list[TaskResult | None]]:
    """Each run's result by task and metric, in order of first appearance; None if a run has none."""
    found = [{(r.name, r.metric): r for r in run.tasks.results} if run.tasks else {} for run in runs]
    tasks = dict.fromkeys(task for results in found for task in results)
    return {task: [results.get(task) for results in found] for task in tasks}


def _comparison_curves(runs: list[Run]) -> list[Plot]:
    """Overlaid curves, over tokens if every run counts them, else over steps."""
    by_tokens = all(run.series(TOKENS) for run in runs)
    x = "tokens" if by_tokens else "step"
    curves = []
    for metric, title, y, adjust in (
        (TRAIN_LOSS, "Training loss", "loss (nats per token)", None),
        (HELD_OUT["bits_per_byte"], "Held-out bits per byte", "bits per byte", None),
        (GRADIENT_NORM, "Gradient norm", "gradient norm", plots.make_logarithmic),
        (THROUGHPUT, "Throughput", "tokens per second", plots.start_at_zero),
    ):
        series = [run.series(metric) for run in runs]
        if not any(series):
            continue
        smoothed = metric != HELD_OUT["bits_per_byte"]
        if smoothed:
            series = [Series(one.steps, plots.smooth(one.values)) for one in series]
        if by_tokens:
            series = [_by_tokens(run, one) for run, one in zip(runs, series, strict=True)]
        marker, explanation = (None, "smoothed") if smoothed else ("o", "")
        drawing = plots.svg(plots.draw_comparison, f"{title} by {x}", series, x, y, marker, adjust)
        curves.append(Plot(title, drawing, explanation))
    return curves


def _by_tokens(run: Run, series: Series) -> Series:
    """The series over tokens instead of steps, interpolated between reports."""
    tokens = run.series(TOKENS)
    return Series(np.interp(series.steps, tokens.steps, tokens.values), series.values)


def _config_differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Configuration values that differ between runs, by dotted key; None for a missing one."""
    configs = [_flatten(parse_yaml(run.config, str(run.path / CONFIG_NAME))) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name) for config in configs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted key."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for name, inner in value.items():
        leaves |= _flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    return leaves


def _render(template: str, **content: Any) -> str:
    environment = Environment(
        loader=PackageLoader("ultramem.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(abbreviate=abbreviate, in_unit=in_unit)
    return environment.get_template(template).render(content)
