"""The kinds of memory by name. A new kind is a file beside this one, and a line here."""

from ultramem.layers.memory_layer import MemoryLayer
from ultramem.layers.memory_plus import MemoryPlus
from ultramem.layers.pkm import ProductKeyMemory
from ultramem.layers.ultramem import UltraMem
from ultramem.layers.ultramem_v2 import UltraMemV2

KINDS: dict[str, type[MemoryLayer]] = {
    "pkm": ProductKeyMemory,
    "memory_plus": MemoryPlus,
    "ultramem": UltraMem,
    "ultramem_v2": UltraMemV2,
}
