"""Evaluation during training, on held-out data and on tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from olmo_core.distributed.utils import broadcast_object, get_rank, get_world_size
from olmo_core.eval import Evaluator
from olmo_core.train.callbacks import Callback, EvaluatorCallback
from torch import Tensor

from ultramem.data.token_sequences import TokenSequences
from ultramem.evaluation.tasks import TaskSuite
from ultramem.runs.directory import recorded_metrics
from ultramem.runs.layout import HELD_OUT_METRICS, TASK_METRICS
from ultramem.training.checkpoints import Checkpoints, timed_apart


class HeldoutBatches:
    """This process's share of the held-out sequences, in batches; all of the group have the same number of batches."""

    def __init__(self, sequences: TokenSequences, batch_size: int, group: dist.ProcessGroup | None) -> None:
        self.sequences, self.batch_size = sequences, batch_size
        self.rank, self.processes = get_rank(group), get_world_size(group)

    def __len__(self) -> int:
        """Number of batches per process."""
        return math.ceil(math.ceil(len(self.sequences) / self.processes) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield `input_ids` (batch size, length), int64, and `label_mask`, false where there is no token to predict."""
        own = islice(self.sequences, self.rank, None, self.processes)
        for _ in range(len(self)):
            tokens = torch.zeros(self.batch_size, self.sequences.length, dtype=torch.int64)
            mask = torch.zeros_like(tokens, dtype=torch.bool)
            for row, sequence in enumerate(islice(own, self.batch_size)):
                tokens[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
                mask[row, : len(sequence)] = True
            yield {"input_ids": tokens, "label_mask": mask}


class HeldoutEvaluator(Evaluator):
    """Mean loss on held-out sequences: `CE loss` (nats per token), `perplexity`, and `bits per byte` if known.

    `bytes_per_token` is the number of UTF-8 bytes of text per token, if known.
    """

    def __init__(
        self,
        batches: HeldoutBatches,
        bytes_per_token: float | None,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(name="heldout", batches=batches, device=device)
        self.bytes_per_token, self.group = bytes_per_token, group
        self.reset_metrics()

    def update_metrics(self, batch: dict[str, Any], ce_loss: Tensor | None, logits: Tensor | None) -> None:
        """Add a batch; `ce_loss` (batch size, length) is 0 where there is no token to predict."""
        del logits
        assert ce_loss is not None
        predicted = batch["label_mask"][:, 1:].sum().to(self._sums)
        self._sums += torch.stack([ce_loss.sum(dtype=self._sums.dtype).to(self._sums), predicted])

    def compute_metrics(self) -> dict[str, Tensor]:
        """The metrics over the sequences of all processes."""
        if dist.is_initialized():
            dist.all_reduce(self._sums, group=self.group)
        loss = self._sums[0] / self._sums[1]
        metrics = {"CE loss": loss, "perplexity": loss.exp()}
        if self.bytes_per_token is not None:
            metrics["bits per byte"] = loss / math.log(2) / self.bytes_per_token
        return metrics

    def reset_metrics(self) -> None:
        """Set the sums to zero."""
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, predicted tokens


def make_up_for_kill(callback: Callback, metrics_file: Path, prefix: str) -> None:
    """Evaluate the step that a run resumes from, if it was killed between that step's checkpoint and its evaluation.

    `prefix` begins the names of the evaluation's metrics in the file. The callback's `post_step` evaluates, if due.
    """
    if callback.step == 0:
        return
    recorded = recorded_metrics(metrics_file, callback.step)
    if not broadcast_object(any(name.startswith(prefix) for name in recorded)):
        callback.post_step()
        callback.trainer._log_metrics()  # no step follows the last one


@dataclass
class HeldoutCallback(EvaluatorCallback):
    """Evaluates on held-out data, without an effect on the metrics of training."""

    metrics_file: Path = field(default_factory=Path)

    def pre_train(self) -> None:
        """Make up for an evaluation that is missing."""
        make_up_for_kill(self, self.metrics_file, HELD_OUT_METRICS)

    def perform_eval(self, prefix: str = "eval") -> None:
        """Evaluate, and keep the metrics of training as they are."""
        with timed_apart(self):
            super().perform_eval(prefix)


@dataclass
class TaskCallback(Callback):
    """Evaluates the model on tasks every `interval` steps, if given, and at the end; all processes share the work."""

    suite: TaskSuite
    interval: int | None
    last_step: int
    checkpoints: Checkpoints
    metrics_file: Path

    def pre_train(self) -> None:
        """Make up for an evaluation that is missing."""
        make_up_for_kill(self, self.metrics_file, TASK_METRICS)

    def post_step(self) -> None:
        """Evaluate if it is time."""
        if self.step != self.last_step and (self.interval is None or self.step % self.interval):
            return
        if self.step == self.last_step:  # a failure from here on must not cost the steps
            self.checkpoints.post_train()
        model = self.trainer.train_module.model
        with timed_apart(self):
            model.eval()
            results = self.suite.run(model, group=self.trainer.dp_process_group)
            model.train()
        for result in results:
            self.trainer.record_metric(f"{TASK_METRICS}{result.name}", result.value)
