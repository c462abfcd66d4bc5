"""Training that gives the same bits every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ultramem.training.environment import environment_variable


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Have PyTorch choose algorithms whose additions have a fixed order, and its compiler choose none by timing them.

    The one setting does both since PyTorch 2.10. An operation that has no such algorithm raises `RuntimeError` (see
    `torch.use_deterministic_algorithms`).
    """
    settings: Any = torch.utils.deterministic
    enabled, filled = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # which helps to find errors, and writes every new tensor twice
    try:
        # cuBLAS is deterministic with a workspace of its own for each stream.
        with environment_variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8"):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = filled
