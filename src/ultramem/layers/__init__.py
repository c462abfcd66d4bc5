"""Memory layers as PyTorch modules."""

from ultramem.layers.initialization import HostScheme
from ultramem.layers.memory_layer import MemoryLayer
from ultramem.layers.product_key import MemoryPlus, ProductKeyMemory
from ultramem.layers.tucker import TuckerMemory

__all__ = ["HostScheme", "MemoryLayer", "MemoryPlus", "ProductKeyMemory", "TuckerMemory"]
