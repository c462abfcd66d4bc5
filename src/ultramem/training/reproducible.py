"""Training that gives the same bits each time: deterministic algorithms, and random numbers by the step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import Callback


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable of this process within a `with` block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


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


@dataclass
class StepSeed(Callback):
    """Seeds random numbers (dropout) by the run's seed and the step, so that a resumed run draws the same ones."""

    seed: int = 0

    def pre_step(self, batch: dict[str, Any]) -> None:
        """Seed this process's generators."""
        del batch
        entropy = np.random.SeedSequence([self.seed, self.step, get_rank()])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
