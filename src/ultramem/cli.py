"""The `ultramem` command. Each subcommand checks its arguments and calls one function elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from ultramem.errors import UltraMemError

try:
    import typer
    from rich.console import Console
except ImportError:  # `pip install ultramem` alone has no command line tools
    sys.exit(
        "ultramem: the command line needs more packages; install them with: pip install 'ultramem[train]'"
    )

app = typer.Typer(
    help="Sparse memory layers for language models.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.callback()
def callback() -> None:
    """Sparse memory layers for language models."""


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories; several make a comparison.", metavar="RUN...")
    ],
    output: Annotated[
        Path | None, typer.Option(help="File to write; for a single run the default is RUN/report.html.")
    ] = None,
) -> None:
    """Write an HTML page about a training run, or one that compares several."""
    from ultramem.report import write_report

    typer.echo(f"report written to {write_report(runs, output)}")


def main() -> None:
    """Run the command; a user's mistake ends in one line on standard error and status 1."""
    try:
        app()
    except UltraMemError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {error}")
        sys.exit(1)
