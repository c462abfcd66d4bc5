"""Options that apply only with others."""

from __future__ import annotations

from collections.abc import Mapping

from ultramem.errors import ConfigError


def refuse(options: Mapping[str, object], remedy: str) -> None:
    """Raise an error for the first option that is not None.

    Args:
        options: values by option name, without dashes.
        remedy: what to do instead.

    Raises:
        ConfigError: an option is given.
    """
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name}: does not apply here; {remedy}")
