"""The `ultramem` command. Each subcommand checks its arguments and calls one function elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

from ultramem.errors import UltraMemError, first_line

try:
    import typer
    from typer.core import TyperGroup
except ImportError:  # `pip install ultramem` alone has no command line tools
    sys.exit("ultramem: the command line needs more packages; install them with: pip install 'ultramem[train]'")

from ultramem.cli import border, data, models, runs


class _Commands(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As in Typer, which takes an empty path for the working directory."""
        name, command, arguments = super().resolve_command(ctx, args)
        if "" in arguments and name != "generate":  # whose prompts may be empty
            raise UltraMemError("an argument is empty; for the working directory write .")
        return name, command, arguments

    def invoke(self, ctx: Any) -> Any:
        """As in Typer, which would take a file that ends too early for the end of a dialogue."""
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise UltraMemError(f"a file ends too early ({first_line(error)}); write it again") from error


app = typer.Typer(
    help="Sparse memory layers for language models.",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
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
app.command()(data.tokenize)
app.command()(data.write_facts)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(runs.train)
app.command()(runs.evaluate)
app.command()(runs.generate)
app.command()(runs.report)
app.command()(models.export)
app.command()(models.finetune)
app.command()(models.import_olmo)
app.command(context_settings={"ignore_unknown_options": True})(models.import_flags)


def main() -> None:
    """Run the command; a user's mistake ends in one line on standard error and status 1. See `border.run_command`."""
    border.run_command(app)
