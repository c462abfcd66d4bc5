"""Memory layers as PyTorch modules, a file for each kind."""

from ultramem.layers.initial_values import HostScheme
from ultramem.layers.kinds import KINDS
from ultramem.layers.memory_layer import MemoryLayer

__all__ = ["KINDS", "HostScheme", "MemoryLayer"]
