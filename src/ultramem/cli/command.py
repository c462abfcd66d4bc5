"""A command that takes each of its options once, and the group of commands."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup, TyperOption

from ultramem.errors import ConfigError, UltraMemError, first_line


class Command(TyperCommand):
    """Refuses an option that is given twice, unless it is repeatable, and empty values, except of prompts."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check the arguments, then parse them.

        Raises:
            ConfigError: an option is given twice, or a value is empty.
        """
        values, _, order = self.make_parser(ctx).parse_args(list(args))
        for option in order:
            if not isinstance(option, TyperOption):
                given = values[str(option.name)]
                if option.name != "prompts" and (given == "" or (isinstance(given, list | tuple) and "" in given)):
                    raise ConfigError(f"{option.name}='': must not be empty; for the working directory write .")
                continue
            if option.is_flag:
                continue
            name, given = option.opts[0], values[str(option.name)]
            if not option.multiple and order.count(option) > 1:
                raise ConfigError(f"{name}: is given twice; leave out one of them")
            if "" in (given if option.multiple else [given]):
                raise ConfigError(f"{name}='': must not be empty; leave it out")
        return super().parse_args(ctx, args)


class Commands(TyperGroup):
    """The group of commands."""

    def invoke(self, ctx: Any) -> Any:
        """As in Typer, which would take a file that ends too early for the end of a dialogue."""
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise UltraMemError(f"a file ends too early ({first_line(error)}); write it again") from error
