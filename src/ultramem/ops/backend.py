"""The choice between an operation's definition in plain PyTorch and its kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from ultramem.errors import UltraMemError

Backend = Literal["auto", "naive", "fused"]

# Triton's interpreter runs kernels on the CPU, for tests. Triton reads the variable when it is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
HAS_KERNELS = find_spec("triton") is not None and (_INTERPRETED or bool(torch.version.cuda or torch.version.hip))

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_backend: Backend = "auto"


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Fix the backend of every operation inside a `with` block, in all threads.

    `auto`, the default, uses kernels if they support the arguments, else plain PyTorch. `naive` always uses plain
    PyTorch. `fused` always uses kernels, and operations without one raise an error.

    Raises:
        UltraMemError: the backend is invalid.
    """
    global _backend
    if backend not in get_args(Backend):
        raise UltraMemError(f"backend={backend!r}: must be one of {', '.join(get_args(Backend))}")
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


def can_run_kernels(tensor: Tensor) -> bool:
    """Whether Triton kernels run on the tensor's device: on GPUs, and in the interpreter if it is enabled."""
    interpreted = _INTERPRETED and _backend == "fused" and tensor.device.type == "cpu"
    return HAS_KERNELS and (tensor.is_cuda or interpreted)


def kernels_are_demanded() -> bool:
    """Whether the backend is `fused`. On GPUs kernels whose tests have not all passed there need it."""
    return _backend == "fused"


def runs_now_on_cpu(tensor: Tensor) -> bool:
    """Whether what is done with a tensor is done at once, on a CPU: not while a program is traced or compiled."""
    with_contents = type(tensor) is Tensor and tensor.device.type == "cpu"
    return with_contents and not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # type: ignore[attr-defined]


def takes_kernels(operation: str, supported: bool) -> bool:
    """Whether an operation, by name, uses its kernels: if they support its arguments, unless the backend is `naive`.

    Raises:
        UltraMemError: the backend is `fused`, and kernels do not support the arguments.
    """
    if _backend == "fused" and not supported:
        raise UltraMemError(f"{operation} has no fused kernel for these arguments; use the backend 'auto'")
    return supported and _backend != "naive"


def autocast_dtype(tensor: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype to compute with a tensor in: that of autocast if enabled, else `dtype`, by default the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype or tensor.dtype
