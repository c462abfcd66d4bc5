"""Column names of tables with several checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape


def column_names(checkpoints: Sequence[tuple[Path, str]]) -> list[str]:
    """Headers of a rich table: run directory and checkpoint, with the whole path if two names are the same."""
    names = [f"{run.name}/{checkpoint}" for run, checkpoint in checkpoints]
    if len(set(names)) < len(names):
        names = [f"{run}/{checkpoint}" for run, checkpoint in checkpoints]
    return [escape(name) for name in names]
