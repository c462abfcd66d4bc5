"""Write the tables and plots of docs/comparison.md from the results that `benchmarks.comparison` left.

`python -m benchmarks.comparison_page` replaces what stands between the page's markers, such as `<!-- losses -->` and
`<!-- end -->`, and draws the plots beside the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.comparison import SYSTEMS, VARIANTS
from benchmarks.measurement import write_plot
from ultramem.data.facts import EXPOSURES
from ultramem.errors import UltraMemError
from ultramem.filesystem import write_text

# A model's runs, which differ in their seed.
Runs = Mapping[str, Sequence[dict[str, Any]]]
LABELS = {
    "dense": "dense",
    "olmoe": "mixture of experts",
    "pkm": "PKM",
    "memory_plus": "Memory+",
    "ultramem": "UltraMem",
    "ultramem_v2": "UltraMemV2",
    "ultramem_v2-matched": "UltraMemV2, `matched`",
    "ultramem_v2-constant": "UltraMemV2, constant rate of the values",
}
FIRST_STEP_SHOWN = 400  # before it the curves fall too steeply to be told apart


def read_runs(directory: Path) -> Runs:
    """The results in a directory, models in the order of the comparison, seeds in theirs.

    Raises:
        UltraMemError: there are none.
    """
    runs = defaultdict(list)
    for path in sorted(directory.glob("*-seed*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        runs[content["model"]].append(content)
    if not runs:
        raise UltraMemError(f"{directory} has no results; make them with python -m benchmarks.comparison")
    return {model: runs[model] for model in (*SYSTEMS, *VARIANTS) if model in runs}


def losses(runs: Runs) -> str:
    """Table of the models' sizes, final losses and speeds."""
    dense = _mean(runs["dense"], _loss) if "dense" in runs else None
    rows = []
    for model, seeds in runs.items():
        counts, loss = seeds[0]["parameters"], _mean(seeds, _loss)
        rows.append(
            [
                LABELS[model],
                f"{counts['active_without_embeddings'] / 1e6:.1f} M",
                f"{counts['total_without_embeddings'] / 1e6:.1f} M",
                ", ".join(str(run["seed"]) for run in seeds),
                _spread(seeds, _loss, 4),
                "" if dense is None else f"{loss - dense:+.4f}",
                f"{_mean(seeds, lambda run: run['heldout']['bits_per_byte']):.4f}",
                f"{_mean(seeds, lambda run: run['tokens_per_second']) / 1e3:,.0f} k",
            ]
        )
    head = ["", "active", "total", "seeds", "held-out loss", "against dense", "bits per byte", "tokens/s"]
    return _table(head, rows)


def tasks(runs: Runs) -> str:
    """Table of the memory tasks, in percent."""
    rows = []
    for model, seeds in runs.items():
        rows.append([LABELS[model], *(_spread(seeds, _task(name), 1) for name in ("recall", "copying", "facts"))])
    return _table(["", "recall", "copying", "facts"], rows)


def facts(runs: Runs) -> str:
    """Table of the facts known by the number of times that they were seen, in percent."""
    names = [f"facts/exposures{number}" for number in EXPOSURES]
    rows = [[LABELS[model], *(f"{_mean(seeds, _task(name)):.0f}" for name in names)] for model, seeds in runs.items()]
    return _table(["times seen", *map(str, EXPOSURES)], rows)


TABLES: dict[str, Callable[[Runs], str]] = {"losses": losses, "tasks": tasks, "facts": facts}


def draw_losses(runs: Runs) -> Figure:
    """Held-out loss over training, and by how much it is below that of the dense model; means over the seeds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    whole, against = figure.subplots(1, 2)
    curves = {model: _curve(seeds) for model, seeds in runs.items()}
    for number, (model, curve) in enumerate(curves.items()):
        steps = [step for step in curve if step >= FIRST_STEP_SHOWN]
        style = {"color": f"C{number}", "label": LABELS[model].replace("`", "")}
        whole.plot(steps, [curve[step] for step in steps], **style)
        if "dense" in curves:
            against.plot(steps, [curve[step] - curves["dense"][step] for step in steps], **style)
    whole.set_ylabel("held-out loss (nats per token)")
    against.set_ylabel("less that of dense")
    for axes in (whole, against):
        axes.set_xlabel("step of 65,536 tokens")
        axes.grid(alpha=0.3)
    whole.legend()
    return figure


def draw_facts(runs: Runs) -> Figure:
    """Share of the facts known by the number of times seen."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    seen = EXPOSURES[1:]
    for number, (model, seeds) in enumerate(runs.items()):
        values = [_mean(seeds, _task(f"facts/exposures{count}")) for count in seen]
        axes.plot(seen, values, color=f"C{number}", marker="o", markersize=3, label=LABELS[model].replace("`", ""))
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
    """The mean, and the standard deviation between seeds if there are several."""
    text = f"{_mean(runs, value):.{digits}f}"
    return text if len(runs) == 1 else f"{text} ± {statistics.stdev(map(value, runs)):.{digits}f}"


def _curve(runs: Sequence[dict[str, Any]]) -> dict[float, float]:
    """Mean held-out loss by step."""
    points = defaultdict(list)
    for run in runs:
        for step, value in run["curves"]["heldout"]:
            points[step].append(value)
    return {step: statistics.fmean(values) for step, values in points.items()}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rows))


def main() -> None:
    """Fill the page, draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/comparison"))
    parser.add_argument("--page", type=Path, default=Path("docs/comparison.md"))
    arguments = parser.parse_args()
    runs = read_runs(arguments.results)
    write_text(arguments.page, fill(arguments.page.read_text(encoding="utf-8"), runs))
    write_plot(arguments.results / "losses.png", draw_losses(runs))
    write_plot(arguments.results / "facts.png", draw_facts(runs))


if __name__ == "__main__":
    try:
        main()
    except UltraMemError as error:
        sys.exit(f"error: {error}")
