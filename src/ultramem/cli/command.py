"""A command that takes each of its options once, and nothing empty."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperOption

from ultramem.errors import ConfigError, UltraMemError, first_line


class Command(TyperCommand):
    """Refuses an option that is given twice, unless it is repeatable, and empty values, except for prompts."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check the arguments, then parse them. Typer takes an empty path for the working directory.

        Raises:
            ConfigError: an option is given twice, or is empty.
            UltraMemError: another argument is empty.
        """
        values, _, order = self.make_parser(ctx).parse_args(list(args))
        for parameter in order:
            given = values[str(parameter.name)]
            is_empty = "" in (given if isinstance(given, list | tuple) else [given])
            if not isinstance(parameter, TyperOption):
                if is_empty and parameter.name != "prompts":
                    raise UltraMemError("an argument is empty; for the working directory write .")
                continue
            if parameter.is_flag:
                continue
            name = parameter.opts[0]
            if not parameter.multiple and order.count(parameter) > 1:
                raise ConfigError(f"{name}: is given twice; leave out one of them")
            if is_empty:
                raise ConfigError(f"{name}='': must not be empty; leave it out")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """As in Typer, which would take a file that ends too early for the end of a dialogue.

        Raises:
            UltraMemError: a file ends too early.
        """
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise UltraMemError(f"a file ends too early ({first_line(error)}); write it again") from error
