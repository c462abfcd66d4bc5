"""Errors for options that do not apply and for packages that are not installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ultramem.errors import ConfigError, UltraMemError


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


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Wrap imports of packages that an extra installs.

    Raises:
        UltraMemError: a package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise UltraMemError(
            f"this command needs the package {error.name}; install it with: pip install 'ultramem[{extra}]'"
        ) from error
