"""A command that takes each of its options once."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperOption

from ultramem.errors import ConfigError


class Command(TyperCommand):
    """Refuses an option that is given twice, unless it is repeatable, and empty values of options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check the arguments, then parse them.

        Raises:
            ConfigError: an option is given twice, or is empty.
        """
        values, _, order = self.make_parser(ctx).parse_args(list(args))
        for option in order:
            if not isinstance(option, TyperOption) or option.is_flag:
                continue
            name, given = option.opts[0], values[str(option.name)]
            if not option.multiple and order.count(option) > 1:
                raise ConfigError(f"{name}: is given twice; leave out one of them")
            if "" in (given if option.multiple else [given]):
                raise ConfigError(f"{name}='': must not be empty; leave it out")
        return super().parse_args(ctx, args)
