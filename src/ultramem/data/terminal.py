"""Terminal output of `ultramem tokenize`: its progress, and a table at the end."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

from ultramem.data.token_files import Manifest


def progress_display() -> Progress:
    """A progress display on standard error; it shows nothing unless that is a terminal."""
    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet,
    )


def print_summary(manifest: Manifest) -> None:
    """Print what was written to each split, and what was skipped."""
    console = Console(highlight=False, soft_wrap=True)
    names = ("files", "documents", "tokens", "bytes", "bytes per token")
    table = Table("split", *(Column(name, justify="right") for name in names))
    for split in manifest.splits.values():
        counts = (len(split.files), split.documents, split.tokens, split.bytes)
        ratio = f"{split.bytes / split.tokens:.3f}" if split.tokens else "none"
        table.add_row(split.name, *(f"{count:,}" for count in counts), ratio)
    console.print(table)
    console.print(f"tokenizer: {escape(manifest.tokenizer)}, {manifest.dtype}", end="; ")
    console.print(f"skipped records: {manifest.skipped:,}; near-duplicates left out: {manifest.near_duplicates:,}")
    for example in manifest.skipped_examples:
        console.print(f"  {escape(example)}")
    if manifest.skipped > len(manifest.skipped_examples):
        console.print("  ...")
    if not manifest.splits["heldout"].files:
        console.print(
            "[yellow]no document is held out[/], so there is nothing to evaluate on; change --heldout or --seed"
        )
    console.print(f"written to {escape(str(manifest.directory))}")
