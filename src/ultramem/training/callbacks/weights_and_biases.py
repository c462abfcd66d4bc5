"""Metrics on Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_core.train.callbacks import WandBCallback


@dataclass
class WeightsAndBiases(WandBCallback):
    """OLMo-core's callback, made to work with recent versions of wandb."""

    def finalize(self, exit_code: int = 0) -> None:
        """Finish the run on Weights & Biases."""
        if not self.finalized:
            self.wandb.finish(exit_code=exit_code)
            self._finalized = True
