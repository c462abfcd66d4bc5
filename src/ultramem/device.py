"""The device, its memory, and the precision that models compute with."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from ultramem.errors import ConfigError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


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


def check_memory(needed: Mapping[str, int], device: torch.device) -> None:
    """Check that a device has the memory that something needs in any case; it may need more.

    Args:
        needed: bytes by what to lower for fewer: a configuration field and its value, such as `model.d_model=768`.
        device: the device.

    Raises:
        ConfigError: the device has less.
    """
    total, there = sum(needed.values()), total_memory(device)
    if total > there:
        place = "the GPU" if device.type == "cuda" else "the machine"
        raise ConfigError(
            f"{max(needed, key=lambda name: needed[name])}: must be lower, as at least {_in_gb(total)} of memory are "
            f"needed and {place} has {_in_gb(there)}; choose smaller sizes"
        )


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the machine as far as this process may use it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # of a container
        with suppress(OSError, ValueError):
            limits.append(int(Path(file).read_text()))
    return min(limits)


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, for its next allocations, where the C library is glibc.

    Otherwise each tensor above 32 MB, such as logits, is new memory, which the system clears page by page as it is
    written: a third of a step's time of a small model on a CPU. The process stays as large as it ever was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def _in_gb(size: int) -> str:
    return f"{size // 10**9:,} GB" if size >= 10**9 else f"{size // 10**6:,} MB"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device is a GPU with hardware support for bfloat16."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 on GPUs with hardware support for it; disabled elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device))
