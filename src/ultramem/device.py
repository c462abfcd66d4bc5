"""The device and precision that models compute with."""

from __future__ import annotations

import torch

from ultramem.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device named `cpu` or `cuda`; `auto` is CUDA if a device is available, else the CPU.

    Raises:
        ConfigError: the name is invalid or the device is not available.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device={name}: must be auto, cpu or cuda")
    if name == "cuda" and not available:
        raise ConfigError("device=cuda: PyTorch finds no CUDA device here; use cpu")
    return torch.device(name)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device is a GPU with hardware support for bfloat16."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 on GPUs with hardware support for it; disabled elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device))
