"""The `ultramem` command. Each subcommand checks its arguments and calls one function elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

try:
    import typer
except ImportError:  # `pip install ultramem` alone has no command line tools
    sys.exit("ultramem: the command line needs more packages; install them with: pip install 'ultramem[train]'")

from ultramem.cli import border, data, models, runs
from ultramem.cli.command import Command

app = typer.Typer(
    help="Sparse memory layers for language models.", no_args_is_help=True, pretty_exceptions_enable=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ultramem import __version__

        typer.echo(f"ultramem {__version__}")
        raise typer.Exit


@app.callback()
def callback(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Sparse memory layers for language models."""
    del version
    logging.getLogger("olmo_core.nn.attention.te_attn_api").setLevel(logging.ERROR)  # it warns of a missing extra


# `ultramem --help` lists them in this order, which is that of a user's work.
app.command(cls=Command)(data.tokenize)
app.command(cls=Command)(data.write_facts)
app.command(cls=Command, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(runs.train)
app.command(cls=Command)(runs.evaluate)
app.command(cls=Command)(runs.generate)
app.command(cls=Command)(runs.report)
app.command(cls=Command)(models.export)
app.command(cls=Command)(models.finetune)
app.command(cls=Command)(models.import_olmo)
app.command(cls=Command, context_settings={"ignore_unknown_options": True})(models.import_flags)


def main() -> None:
    """Run the command; a user's mistake ends in one line on standard error and status 1. See `border.run_command`."""
    border.run_command(app)
