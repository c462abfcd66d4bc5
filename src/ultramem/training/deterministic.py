"""Deterministic training: every time the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ultramem.training.environment import environment_variable


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let PyTorch use deterministic algorithms, and its compiler choose none by timing them.

    Since PyTorch 2.10 one setting does both. An operation without a deterministic algorithm raises `RuntimeError`; see
    `torch.use_deterministic_algorithms`.
    """
    settings: Any = torch.utils.deterministic
    enabled, filled = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # it helps to find errors, but writes every new tensor twice
    try:
        # cuBLAS is deterministic with a workspace of its own for each stream.
        with environment_variable("CUBLAS_WORKSPACE_CONFIG", ":4096:8"):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = filled
