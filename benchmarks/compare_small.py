"""Train small models of several systems on the same tokens, in the same order, and compare them.

`python -m benchmarks.compare_small --systems dense ultramem_v2`; the models are the presets `SYSTEM_small`, of equal
active parameters. A run that was interrupted goes on; one that is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ultramem.errors import UltraMemError
from ultramem.evaluation import Evaluation, evaluate
from ultramem.report import write_report
from ultramem.run_layout import REPORT_NAME, SUMMARY_NAME
from ultramem.training import load_config, train

SYSTEMS = ("dense", "olmoe", "pkm", "memory_plus", "ultramem", "ultramem_v2")


def main() -> None:
    """Train, evaluate on all held-out text, print a table, write a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["dense", "ultramem_v2"])
    parser.add_argument("--directory", type=Path, default=Path("runs/compare-small"))
    arguments, overrides = parser.parse_known_args()
    runs = {}
    for system in arguments.systems:
        directory = arguments.directory / system
        config = load_config(
            arguments.config, [f"model.preset={system}_small", f"trainer.directory={directory}", *overrides]
        )
        Console().rule(system)
        train(config)
        evaluation = evaluate(directory)
        evaluation.save()
        runs[system] = evaluation
    show(runs)
    report = write_report([arguments.directory / system for system in runs], arguments.directory / REPORT_NAME)
    print(f"report written to {report}")


def show(runs: dict[str, Evaluation]) -> None:
    """Print a table of the runs, with the unigram model of the training text."""
    table = Table()
    for column in ("system", "active", "total", "tokens", "held-out loss", "bits/byte"):
        table.add_column(column, justify="left" if column == "system" else "right")
    unigram = next(iter(runs.values())).unigram_bits_per_byte
    table.add_row("unigram", "", "", "", "", f"{unigram:.4f}")
    for system, evaluation in runs.items():
        summary = json.loads((evaluation.run / SUMMARY_NAME).read_text(encoding="utf-8"))
        counts = summary["parameters"]
        table.add_row(
            system,
            f"{counts['active_without_embeddings']:,}",
            f"{counts['total_without_embeddings']:,}",
            f"{summary['train_tokens']:,}",
            f"{evaluation.loss:.4f}",
            f"{evaluation.bits_per_byte:.4f}",
        )
    table.caption = "Parameters without embeddings."
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except UltraMemError as error:
        sys.exit(f"error: {error}")
