"""Progress of `ultramem tokenize`, shown on a terminal only."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

REFRESH_SECONDS = 0.1


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


class DocumentMeter:
    """A line of the display that counts documents and bytes.

    Args:
        display: display to show the line on.
        description: text before the numbers.
        total: total number of bytes.
    """

    def __init__(self, display: Progress, description: str, total: int) -> None:
        self.display = display
        self.task = display.add_task(description, total=total, documents=0)
        self.total = total
        self.documents = 0
        self._next_refresh = 0.0

    def advance(self, completed: int) -> None:
        """Count one more document; `completed` is the number of bytes read so far."""
        self.documents += 1
        if (now := time.monotonic()) >= self._next_refresh:
            self.display.update(self.task, completed=completed, documents=self.documents)
            self._next_refresh = now + REFRESH_SECONDS

    def finish(self) -> None:
        """Mark the line as complete."""
        self.display.update(self.task, completed=self.total, documents=self.documents)
