"""The host for inference, fine-tuning and retrofits: transformers. Importing it registers the models."""

from ultramem.hosts.transformers.attachment import attach_memory, detach_memory
from ultramem.hosts.transformers.files import load_memory, save_memory
from ultramem.hosts.transformers.model import UltraMemConfig, UltraMemForCausalLM, UltraMemModel

__all__ = [
    "UltraMemConfig",
    "UltraMemForCausalLM",
    "UltraMemModel",
    "attach_memory",
    "detach_memory",
    "load_memory",
    "save_memory",
]
