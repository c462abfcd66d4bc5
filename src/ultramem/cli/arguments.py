"""What is said of options that have no meaning, and of packages that a command lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ultramem.errors import ConfigError, UltraMemError


def refuse(options: Mapping[str, object], remedy: str) -> None:
    """An error about the first option that is given."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name}: has no meaning here; {remedy}")


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Around an import of what the extra brings."""
    try:
        yield
    except ImportError as error:
        raise UltraMemError(
            f"this command needs the package {error.name}; install it with: pip install 'ultramem[{extra}]'"
        ) from error
