"""Sparse memory layers for language models: PKM, Memory+, UltraMem, UltraMemV2."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultramem.config import MemoryConfig
    from ultramem.errors import ConfigError, UltraMemError
    from ultramem.layers import HostScheme
    from ultramem.memory import Memory
    from ultramem.tables.rowwise import RowwiseAdamW

    __version__: str

_HOME = {
    "ConfigError": "ultramem.errors",
    "HostScheme": "ultramem.layers",
    "Memory": "ultramem.memory",
    "MemoryConfig": "ultramem.config",
    "RowwiseAdamW": "ultramem.tables.rowwise",
    "UltraMemError": "ultramem.errors",
}

__all__ = ["ConfigError", "HostScheme", "Memory", "MemoryConfig", "RowwiseAdamW", "UltraMemError"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, which the command line's help and its worker processes do without.
    if name == "__version__":
        return import_module("importlib.metadata").version("ultramem")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
