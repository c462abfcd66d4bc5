"""Write the tables and plots of docs/comparison.md from the results of `benchmarks.comparison`.

`python -m benchmarks.comparison_page` replaces what stands between the page's markers, such as `<!-- losses -->` and
`<!-- end -->`, and draws the plots beside the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.comparison import SYSTEMS, VARIANTS, system_of
from benchmarks.measurement import write_plot
from ultramem.cli.border import run_command
from ultramem.data.facts import EXPOSURES
from ultramem.errors import UltraMemError
from ultramem.files.whole_files import write_text

# The runs of each model, which differ in their seed.
Runs = Mapping[str, Sequence[dict[str, Any]]]
LABELS = {
    "dense": "dense",
    "olmoe": "mixture of experts",
    "pkm": "PKM",
    "memory_plus": "Memory+",
    "ultramem": "UltraMem",
    "ultramem_v2": "UltraMemV2",
    "dense-nondeterministic": "dense, not deterministic",
    "ultramem_v2-nondeterministic": "UltraMemV2, not deterministic",
    "ultramem_v2-adamw": "UltraMemV2, AdamW for the table",
    "ultramem_v2-decaying": "UltraMemV2, values' rate falling, not deterministic",
    "ultramem_v2-decaying-matched": "UltraMemV2, values' rate falling, `matched`, not deterministic",
}
MEMORY_TASKS = ("recall", "copying", "facts")
FIRST_STEP_SHOWN = 400  # before it the curves fall too steeply to be told apart


def read_runs(directory: Path) -> Runs:
    """Read the results in a directory, in order of models and seeds.

    Raises:
        UltraMemError: there are no results.
    """
    runs = defaultdict(list)
    for path in sorted(directory.glob("*-seed*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        runs[content["model"]].append(content)
    if not runs:
        raise UltraMemError(f"{directory} has no results; make them with python -m benchmarks.comparison")
    return {model: runs[model] for model in (*SYSTEMS, *VARIANTS) if model in runs}


def losses(runs: Runs) -> str:
    """Table of the systems' sizes, final losses and speeds."""
    rows = []
    for system, seeds in _systems(runs).items():
        counts, speed = seeds[0]["parameters"], _speed(runs, system)
        differences = [_loss(run) - _loss(dense) for run, dense in _beside_dense(runs, seeds)]
        rows.append(
            [
                LABELS[system],
                f"{counts['active_without_embeddings'] / 1e6:.1f} M",
                f"{counts['total_without_embeddings'] / 1e6:.1f} M",
                ", ".join(str(run["seed"]) for run in seeds),
                _spread(seeds, _loss, 4),
                f"{statistics.fmean(differences):+.4f}" if differences else "",
                f"{_mean(seeds, lambda run: run['heldout']['bits_per_byte']):.4f}",
                "" if speed is None else f"{speed / 1e3:,.0f} k",
            ]
        )
    head = ["", "active", "total", "seeds", "held-out loss", "against dense", "bits per byte", "tokens/s"]
    return _table(head, rows)


def tasks(runs: Runs) -> str:
    """Table of the memory tasks, in percent."""
    rows = [[LABELS[system], *_on_tasks(seeds)] for system, seeds in _systems(runs).items()]
    return _table(["", *MEMORY_TASKS], rows)


def facts(runs: Runs) -> str:
    """Table of the share of known facts, in percent, by the number of times that the training text states them."""
    rows = [
        [LABELS[system], *(f"{known:.0f}" for known in _facts_known(seeds, EXPOSURES))]
        for system, seeds in _systems(runs).items()
    ]
    return _table(["times seen", *map(str, EXPOSURES)], rows)


def variants(runs: Runs) -> str:
    """Table of the variants, each after its system, all with seed 0."""
    rows, varied = [], {system_of(variant) for variant in VARIANTS}
    for model in sorted(runs, key=lambda name: SYSTEMS.index(system_of(name))):
        seeds = [run for run in runs[model] if run["seed"] == 0]
        if seeds and system_of(model) in varied:
            rows.append([LABELS[model], _spread(seeds, _loss, 4), *_on_tasks(seeds)])
    return _table(["", "held-out loss", *MEMORY_TASKS], rows)


TABLES: dict[str, Callable[[Runs], str]] = {"losses": losses, "tasks": tasks, "facts": facts, "variants": variants}


def draw_losses(runs: Runs) -> Figure:
    """Draw the held-out loss over training, and its difference from dense with the same seeds; means over seeds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    whole, against = figure.subplots(1, 2)
    for number, (system, seeds) in enumerate(_systems(runs).items()):
        style = {"color": f"C{number}", "label": LABELS[system]}
        _plot_curve(whole, _curve(seeds), style)
        pairs = _beside_dense(runs, seeds)
        if pairs:
            curve, dense = (_curve(paired) for paired in zip(*pairs, strict=True))
            _plot_curve(against, {step: curve[step] - dense[step] for step in curve}, style)
    whole.set_ylabel("held-out loss (nats per token)")
    against.set_ylabel("minus that of dense")
    for axes in (whole, against):
        axes.set_xlabel("step of 65,536 tokens")
        axes.grid(alpha=0.3)
    whole.legend()
    return figure


def draw_facts(runs: Runs) -> Figure:
    """Draw the share of known facts by the number of times seen."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    seen = EXPOSURES[1:]
    for number, (system, seeds) in enumerate(_systems(runs).items()):
        axes.plot(seen, _facts_known(seeds, seen), color=f"C{number}", marker="o", markersize=3, label=LABELS[system])
    axes.axhline(100 / 16, color="gray", linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(seen, list(map(str, seen)))
    axes.set_xlabel("times that the training text states the fact")
    axes.set_ylabel("known (% of 256)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def fill(page: str, runs: Runs) -> str:
    """The page with its tables replaced.

    Raises:
        UltraMemError: a marker is missing.
    """
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise UltraMemError(f"the page needs a line {start.strip()} and a line {end} after it")
        page = before + start + make(runs) + end + after
    return page


def _systems(runs: Runs) -> Runs:
    return {system: runs[system] for system in SYSTEMS if system in runs}


def _beside_dense(runs: Runs, seeds: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of a run and the dense run with the same seed, if there is one."""
    dense = {run["seed"]: run for run in runs.get("dense", [])}
    return [(run, dense[run["seed"]]) for run in seeds if run["seed"] in dense]


def _speed(runs: Runs, system: str) -> float | None:
    """Mean tokens per second of the runs that need not be deterministic; None if there are none."""
    known = [
        run for model, seeds in runs.items() if system_of(model) == system for run in seeds if run["tokens_per_second"]
    ]
    fast = [run for run in known if not run["deterministic"]] or known
    return _mean(fast, lambda run: float(run["tokens_per_second"])) if fast else None


def _on_tasks(seeds: Sequence[dict[str, Any]]) -> list[str]:
    return [_spread(seeds, _task(name), 1) for name in MEMORY_TASKS]


def _facts_known(seeds: Sequence[dict[str, Any]], exposures: Sequence[int]) -> list[float]:
    return [_mean(seeds, _task(f"facts/exposures{count}")) for count in exposures]


def _loss(run: dict[str, Any]) -> float:
    return float(run["heldout"]["loss"])


def _task(name: str) -> Callable[[dict[str, Any]], float]:
    def percent(run: dict[str, Any]) -> float:
        values = {task["name"]: float(task["value"]) for task in run["tasks"]}
        if name not in values:
            raise UltraMemError(f"{run['model']}, seed {run['seed']}: no result of {name}; make it with --tasks memory")
        return 100 * values[name]

    return percent


def _mean(runs: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.fmean(map(value, runs))


def _spread(runs: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float], digits: int) -> str:
    """The mean, with the standard deviation over seeds if there are several."""
    text = f"{_mean(runs, value):.{digits}f}"
    return text if len(runs) == 1 else f"{text} ± {statistics.stdev(map(value, runs)):.{digits}f}"


def _curve(runs: Sequence[dict[str, Any]]) -> dict[float, float]:
    """Mean held-out loss by step."""
    points = defaultdict(list)
    for run in runs:
        for step, value in run["curves"]["heldout"]:
            points[step].append(value)
    return {step: statistics.fmean(values) for step, values in points.items()}


def _plot_curve(axes: Axes, curve: Mapping[float, float], style: Mapping[str, Any]) -> None:
    steps = [step for step in curve if step >= FIRST_STEP_SHOWN]
    axes.plot(steps, [curve[step] for step in steps], **style)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rows))


def main() -> None:
    """Fill the page and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/comparison"))
    parser.add_argument("--page", type=Path, default=Path("docs/comparison.md"))
    arguments = parser.parse_args()
    runs = read_runs(arguments.results)
    write_text(arguments.page, fill(arguments.page.read_text(encoding="utf-8"), runs))
    write_plot(arguments.results / "losses.png", draw_losses(runs))
    write_plot(arguments.results / "facts.png", draw_facts(runs))


if __name__ == "__main__":
    run_command(main)
