"""The table at the end of `ultramem tokenize`."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ultramem.data.token_files import Manifest


def print_summary(manifest: Manifest) -> None:
    """Print what was written to each split, and what was skipped."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table("split", "files", "documents", "tokens", "bytes", "bytes per token")
    for column in table.columns[1:]:
        column.justify = "right"
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
