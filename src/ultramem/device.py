"""Where and in which precision models compute."""

from __future__ import annotations

import torch

from ultramem.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device called `cpu` or `cuda`; `auto` is CUDA where there is a device.

    Raises:
        ConfigError: it has another name or is not there.
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
    """Whether it is a GPU with matrix products in bfloat16."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16 on GPUs that have it, in float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device))
