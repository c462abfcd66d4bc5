"""Random numbers of a step that do not depend on where the run was resumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import Callback


@dataclass
class StepSeed(Callback):
    """Seeds each step's random numbers (dropout) by the step's number, so that a resumed run draws the same ones.

    Attributes:
        seed: seed of the run.
    """

    seed: int = 0

    def pre_step(self, batch: dict[str, Any]) -> None:
        """Seed this process's generators."""
        del batch
        entropy = np.random.SeedSequence([self.seed, self.step, get_rank()])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
