"""Memory layers as PyTorch modules, a file for each kind. A new kind is a file here, and a line in `KINDS`."""

from ultramem.layers.initial_values import HostScheme
from ultramem.layers.memory_layer import MemoryLayer
from ultramem.layers.memory_plus import MemoryPlus
from ultramem.layers.pkm import ProductKeyMemory
from ultramem.layers.ultramem import UltraMem
from ultramem.layers.ultramem_v2 import UltraMemV2

__all__ = ["KINDS", "HostScheme", "MemoryLayer"]

KINDS: dict[str, type[MemoryLayer]] = {
    "pkm": ProductKeyMemory,
    "memory_plus": MemoryPlus,
    "ultramem": UltraMem,
    "ultramem_v2": UltraMemV2,
}
