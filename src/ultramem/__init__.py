"""Sparse memory layers for language models: PKM, Memory+, UltraMem, UltraMemV2."""

from ultramem.config import MemoryConfig
from ultramem.errors import ConfigError, UltraMemError
from ultramem.layers import HostScheme
from ultramem.memory import Memory

__all__ = ["ConfigError", "HostScheme", "Memory", "MemoryConfig", "UltraMemError"]
