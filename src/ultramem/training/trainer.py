"""OLMo-core's trainer, with the model, its optimizer, the data and the callbacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from olmo_core.train import Duration, LoadStrategy, Trainer, TrainerConfig
from olmo_core.train.callbacks import Callback
from olmo_core.train.train_module import TransformerActivationCheckpointingConfig, TransformerTrainModule
from rich.console import Console

from ultramem.configuration.decoding import encode
from ultramem.data.token_sequences import TokenSequences
from ultramem.errors import UltraMemError, first_line
from ultramem.evaluation.task_suite import TaskSuite
from ultramem.hosts.olmo_core import ModelConfig
from ultramem.hosts.olmo_core.checkpoint import check_stored_model
from ultramem.runs.config import RunConfig
from ultramem.runs.layout import METRICS_NAME
from ultramem.runs.tokens import TokenData
from ultramem.training.callbacks import (
    Checkpoints,
    HeldoutCallback,
    LayerMetrics,
    MetricsFile,
    ProgressReport,
    StepSeed,
    StopOnSignal,
    StopWhenDiverged,
    TaskCallback,
    TensorBoard,
    WeightsAndBiases,
)
from ultramem.training.checkpointer import CheckpointerConfig
from ultramem.training.data_loader import build_data_loader
from ultramem.training.heldout import HeldoutBatches, HeldoutEvaluator
from ultramem.training.optimizer import build_scheduler, optimizer_config
from ultramem.training.processes import Processes, in_all


class TrainModule(TransformerTrainModule):
    """OLMo-core's module without the dry run before training, whose made-up batch would count in metrics."""

    def train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None:
        """As in OLMo-core."""
        if not dry_run:
            super().train_batch(batch)


def build_trainer(
    config: RunConfig, data: TokenData, suite: TaskSuite | None, processes: Processes, console: Console
) -> Trainer:
    """Build OLMo-core's trainer, at the first step."""
    trainer, optimizer = config.trainer, config.optimizer
    model = config.model.build("meta")
    micro_batch_size = trainer.micro_batch_size or trainer.batch_size // processes.count
    module = TrainModule(
        model=model,
        optim=optimizer_config(optimizer, model),
        rank_microbatch_size=micro_batch_size,
        max_sequence_length=config.data.sequence_length,
        compile_model=trainer.compile,
        dp_config=processes.data_parallel,
        ac_config=TransformerActivationCheckpointingConfig() if trainer.activation_checkpointing else None,
        autocast_precision=processes.autocast,
        # The norm is a metric even without clipping.
        max_grad_norm=float("inf") if optimizer.max_grad_norm is None else optimizer.max_grad_norm,
        scheduler=build_scheduler(config.schedule, optimizer.learning_rate, trainer.total_steps, config.model.memory),
        device=processes.device,
    )
    checkpoints = Checkpoints(
        save_interval=trainer.checkpoint_interval,
        max_checkpoints=trainer.keep_checkpoints,
        save_async=trainer.async_checkpoints,
    )
    callbacks: dict[str, Callback] = {
        "checkpointer": checkpoints,
        "layer_metrics": LayerMetrics(module.model, trainer.memory_metrics_interval),
        "metrics_file": MetricsFile(trainer.directory / METRICS_NAME),
        "step_seed": StepSeed(trainer.seed),
        "stop_on_signal": StopOnSignal(console),
        "stop_when_diverged": StopWhenDiverged(),
    }
    if processes.rank == 0:
        callbacks["progress"] = ProgressReport(console, trainer.metrics_interval)
    if data.heldout and trainer.evaluate_interval is not None:
        callbacks["heldout"] = _heldout_evaluation(config, data, module, micro_batch_size)
    if suite is not None:
        callbacks["tasks"] = TaskCallback(suite, trainer.evaluate_tasks_interval, trainer.total_steps, checkpoints)
    if config.logging.tensorboard:
        callbacks["tensorboard"] = TensorBoard(trainer.directory / "tensorboard")
    if config.logging.wandb is not None:
        callbacks["wandb"] = _wandb(config)
    return TrainerConfig(
        save_folder=str(trainer.directory),
        checkpointer=CheckpointerConfig(),
        load_strategy=LoadStrategy.never,  # `train` has found the checkpoint already
        device=str(processes.device),
        max_duration=Duration.steps(trainer.total_steps),
        # All processes wait for each other to look for a signal, which GPUs should not do at every step.
        cancel_check_interval=trainer.metrics_interval if processes.count > 1 and module.device.type == "cuda" else 1,
        metrics_collect_interval=trainer.metrics_interval,
        async_bookkeeping=False,  # to see a loss that is not finite before a checkpoint is written
        callbacks=callbacks,
    ).build(module, build_data_loader(data, config, processes.device, module.dp_process_group))


def _heldout_evaluation(
    config: RunConfig, data: TokenData, module: TrainModule, micro_batch_size: int
) -> HeldoutCallback:
    trainer, length, group = config.trainer, config.data.sequence_length, module.dp_process_group
    sequences = TokenSequences(data.heldout, data.dtype, data.vocab_size, length, trainer.evaluate_tokens)
    batches = HeldoutBatches(sequences, micro_batch_size // length, group)
    evaluator = HeldoutEvaluator(batches, data.heldout_bytes_per_token, module.device, group)
    return HeldoutCallback(
        evaluators=[evaluator], eval_interval=trainer.evaluate_interval, fixed_steps=[trainer.total_steps]
    )


def _wandb(config: RunConfig) -> WeightsAndBiases:
    assert config.logging.wandb is not None
    os.environ.setdefault("WANDB_API_KEY", "none: offline")  # OLMo-core always needs one
    return WeightsAndBiases(
        project=config.logging.wandb.project,
        entity=config.logging.wandb.entity,
        name=config.trainer.directory.name,
        config=encode(config),
        cancel_tags=None,
    )


def load_checkpoint(trainer: Trainer, checkpoint: Path, model: ModelConfig) -> None:
    """Load a checkpoint; all processes together, which raise the same error.

    Raises:
        UltraMemError: the model or the data differ, or a file cannot be read; a `DamagedFileError` if it is damaged or
            holds more than data.
    """
    in_all(lambda: check_stored_model(checkpoint, model))
    try:
        trainer.load_checkpoint(checkpoint, load_trainer_state=True, load_optim_state=True)
    except (UltraMemError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "fingerprint" in str(error):
            raise UltraMemError(
                f"the training data has changed since {checkpoint} was written; restore it, or start another run"
            ) from error
        raise UltraMemError(
            f"{checkpoint} cannot be loaded ({first_line(error)}); choose an earlier one with --from-checkpoint"
        ) from error
