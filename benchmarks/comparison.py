"""Train models of several systems on the same tokens, in the same order, and compare them.

`python -m benchmarks.comparison dense ultramem_v2 ultramem_v2:1` trains the presets `SYSTEM_medium`, which have equal
active parameters, with seed 0 or the given one; `ultramem_v2-decaying` is one of the variants. Each run is evaluated on
all held-out text and on the tasks of `--tasks`. Its results are written to `--results`, a JSON file per run, from which
`benchmarks.comparison_page` makes docs/comparison.md. An interrupted run is resumed; a run with results is not
repeated. `--size small` trains the presets `SYSTEM_small`. Other options replace values of the configuration.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.measurement import check_outputs, console, environment, write_json
from ultramem.cli.border import run_command
from ultramem.device import choose_device
from ultramem.errors import UltraMemError
from ultramem.evaluation import evaluate, evaluate_tasks
from ultramem.report import write_report
from ultramem.report.run import Run, Series
from ultramem.runs.layout import HELD_OUT, REPORT_NAME, SUMMARY_NAME, THROUGHPUT, TRAIN_LOSS
from ultramem.training import RunConfig, load_config, train

SYSTEMS = ("dense", "olmoe", "pkm", "memory_plus", "ultramem", "ultramem_v2")
# The values' learning rate falls to the model's, as in the papers, here from eight times it.
DECAYING = (
    "model.memory.optimizer=adamw",
    "model.memory.value_lr=null",
    "model.memory.value_lr_multiplier=8",
)
VARIANTS = {
    "dense-nondeterministic": ("trainer.deterministic=false",),
    "ultramem_v2-nondeterministic": ("trainer.deterministic=false",),
    "ultramem_v2-decaying": DECAYING,
    "ultramem_v2-decaying-matched": (*DECAYING, "model.memory.init=matched"),
}
EVALUATION_SEQUENCES = 32  # per batch
STEPS_OF_A_POINT = 20  # steps per point of the training curve


def system_of(model: str) -> str:
    """The system of a model, which is one of `SYSTEMS` or `VARIANTS`."""
    return model.partition("-")[0]


@dataclass(frozen=True)
class Row:
    """A run of the comparison: a system or a variant of one, and a seed.

    Attributes:
        model: one of `SYSTEMS` or `VARIANTS`.
        seed: seed for the initial weights and the order of the data.
    """

    model: str
    seed: int

    @classmethod
    def parse(cls, text: str) -> Row:
        """Parse `MODEL` or `MODEL:SEED`."""
        match = re.fullmatch(r"([a-z0-9_-]+)(?::(\d+))?", text)
        if match is None or match[1] not in (*SYSTEMS, *VARIANTS):
            raise argparse.ArgumentTypeError(
                f"{text!r}: name one of {', '.join((*SYSTEMS, *VARIANTS))}, with a seed as in dense:1"
            )
        return cls(match[1], int(match[2] or 0))

    @property
    def name(self) -> str:
        """Name of the run's directory and results."""
        return f"{self.model}-seed{self.seed}"

    def overrides(self, size: str) -> list[str]:
        """The run's overrides of the shared configuration."""
        seeds = [f"model.seed={self.seed}", f"trainer.seed={self.seed}"] if self.seed else []
        return [f"model.preset={system_of(self.model)}_{size}", *VARIANTS.get(self.model, ()), *seeds]


def main() -> None:
    """Train and evaluate missing runs, print a table, write a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Row.parse, metavar="SYSTEM[:SEED]")
    parser.add_argument("--config", type=Path, default=Path("configs/comparison.yaml"))
    parser.add_argument("--size", choices=["small", "medium"], default="medium")
    parser.add_argument("--directory", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--results", type=Path, help="directory of the results; default: `results` in the directory")
    parser.add_argument("--tasks", nargs="*", default=[], metavar="TASK")
    arguments, replaced = parser.parse_known_args()
    results = arguments.results or arguments.directory / "results"
    check_outputs(results, *(f"{row.name}.json" for row in arguments.rows))
    check_outputs(arguments.directory, REPORT_NAME)
    found = []
    for row in arguments.rows:
        path = results / f"{row.name}.json"
        values = [override.removeprefix("--") for override in replaced]
        given = [*row.overrides(arguments.size), *values, f"trainer.directory={arguments.directory / row.name}"]
        command = f"ultramem train {arguments.config} " + " ".join(f"--{override}" for override in given)
        if not path.is_file():
            console().rule(row.name)
            result = run(row, load_config(arguments.config, given), arguments.tasks)
            write_json(path, {"command": command, **result})
        result = json.loads(path.read_text(encoding="utf-8"))
        if (result["command"], result["evaluated_on"]) != (command, arguments.tasks):
            raise UltraMemError(f"{path} is of another command or other tasks; choose other --results, or remove it")
        found.append(result)
    show(found)
    runs = [arguments.directory / row.name for row in arguments.rows]
    if all(run.is_dir() for run in runs):
        print(f"report written to {write_report(runs, arguments.directory / REPORT_NAME)}")


def run(row: Row, config: RunConfig, tasks: Sequence[str]) -> dict[str, Any]:
    """Train a run, and evaluate it on all held-out text and on tasks; return its results."""
    result = train(config)
    if result.status == "interrupted":
        raise UltraMemError(f"{row.name} was interrupted at step {result.step}; run the same command again")
    directory = result.directory
    evaluation = evaluate(directory, batch_size=EVALUATION_SEQUENCES)
    evaluation.save()
    scores: list[Any] = []
    if tasks:
        (on_tasks,) = evaluate_tasks([directory], tasks)
        on_tasks.save()
        scores = [asdict(result) for result in on_tasks.results]
    read = Run.read(directory)
    heldout, losses, speeds = (read.series(name) for name in (HELD_OUT["loss"], TRAIN_LOSS, THROUGHPUT))
    summary = json.loads((directory / SUMMARY_NAME).read_text(encoding="utf-8"))
    return {
        "model": row.model,
        "seed": row.seed,
        "deterministic": config.trainer.deterministic,
        "evaluated_on": list(tasks),
        "parameters": summary["parameters"],
        "flops_per_token": summary["flops_per_token"],
        "train_tokens": summary["train_tokens"],
        "tokens_per_second": round(statistics.median(speeds.values)) if len(speeds.values) else None,
        "heldout": {
            "tokens": evaluation.tokens,
            "loss": evaluation.loss,
            "bits_per_byte": evaluation.bits_per_byte,
            "unigram_bits_per_byte": evaluation.unigram_bits_per_byte,
        },
        "curves": {"heldout": curve(heldout, 1), "train": curve(losses, STEPS_OF_A_POINT)},
        "tasks": scores,
        "environment": environment(choose_device("auto")),
    }


def curve(series: Series, width: int) -> list[list[float]]:
    """[step, value] points of a metric: the last step and mean of every `width` reports; a shorter rest is left out."""
    points = len(series.steps) // width
    steps = series.steps[: points * width].reshape(points, width)[:, -1]
    values = series.values[: points * width].reshape(points, width).mean(1)
    return [[step, round(value, 5)] for step, value in zip(steps.tolist(), values.tolist(), strict=True)]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table of the runs, with the unigram model of the training text."""
    table = Table(caption="Parameters without embeddings.")
    for column in ("run", "active", "total", "tokens", "tokens/s", "held-out loss", "bits/byte"):
        table.add_column(column, justify="left" if column == "run" else "right")
    unigram = rows[0]["heldout"]["unigram_bits_per_byte"]
    table.add_row("unigram", *[""] * 5, "" if unigram is None else f"{unigram:.4f}")
    for row in rows:
        counts, heldout = row["parameters"], row["heldout"]
        table.add_row(
            f"{row['model']}-seed{row['seed']}",
            f"{counts['active_without_embeddings']:,}",
            f"{counts['total_without_embeddings']:,}",
            f"{row['train_tokens']:,}",
            "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
            f"{heldout['loss']:.4f}",
            f"{heldout['bits_per_byte']:.4f}",
        )
    console().print(table)


if __name__ == "__main__":
    run_command(main)
