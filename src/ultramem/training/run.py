"""A training run from its configuration to its last checkpoint, with OLMo-core's trainer."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from olmo_core.train import Duration, LoadStrategy, Trainer, TrainerConfig
from olmo_core.train.callbacks import Callback
from olmo_core.train.train_module import TransformerActivationCheckpointingConfig, TransformerTrainModule
from rich.console import Console
from rich.markup import escape
from torch.distributed.checkpoint.api import CheckpointException

from ultramem.configuration.decoding import encode
from ultramem.convert.initial_weights import load_weights, read_weights
from ultramem.data.token_windows import TokenWindows
from ultramem.data.tokenizers import load_model_tokenizer
from ultramem.errors import ConfigError, UltraMemError
from ultramem.evaluation.task_suite import TaskSuite, task_names
from ultramem.hosts.olmo_core import ModelStatistics
from ultramem.hosts.olmo_core.checkpoint import check_stored_model
from ultramem.runs.config import RunConfig
from ultramem.runs.directory import RunDirectory
from ultramem.runs.layout import METRICS_NAME
from ultramem.runs.tokens import (
    HeldoutBatches,
    HeldoutEvaluator,
    TokenData,
    build_data_loader,
    check_token_data,
    open_token_data,
)
from ultramem.training.callbacks import (
    Checkpoints,
    DivergedError,
    HeldoutEvaluation,
    LayerMetrics,
    MetricsFile,
    ProgressReport,
    StepSeed,
    StopOnSignal,
    StopWhenDiverged,
    TaskEvaluation,
    TensorBoard,
    WeightsAndBiases,
)
from ultramem.training.deterministic import deterministic_algorithms
from ultramem.training.environment import environment_variable
from ultramem.training.optimizer import build_scheduler, optimizer_config
from ultramem.training.processes import Processes, join_processes

# What OLMo-core's state of a run consists of besides plain values and tensors: NumPy's random state.
_STATE_TYPES: list[Any] = [np.empty(0).__reduce__()[0], np.ndarray, np.dtype, np.dtypes.UInt32DType]

# Of PyTorch, about what OLMo-core does on purpose, and of FSDP about views that nobody changes in place.
_KNOWN_WARNINGS = (
    "called a synchronizing CUDA operation",
    "torch.distributed is disabled, unavailable or uninitialized",
    "DTensor random operators may not have complete support on cpu",
    "FSDP2-wrapped module .* returned a view tensor",
)


@dataclass(frozen=True)
class RunResult:
    """How a call of `train` ended.

    Attributes:
        directory: the run directory.
        step: the last step, of which there is a checkpoint.
        status: `finished`; `interrupted` by a signal; or `already finished` before.
    """

    directory: Path
    step: int
    status: Literal["finished", "interrupted", "already finished"]


def train(
    config: RunConfig, *, overwrite: bool = False, verbose: bool = False, console: Console | None = None
) -> RunResult:
    """Train, or go on with a run that was interrupted, until its last step.

    A run goes on from its latest complete checkpoint exactly as if it had not been interrupted. Under torchrun
    all processes call this.

    Args:
        config: of the run.
        overwrite: replace whatever run is in the directory, also this one.
        verbose: show OLMo-core's log.
        console: where progress is shown; standard output by default.

    Raises:
        ConfigError: the configuration does not suit the machine, the data or the number of processes.
        UltraMemError: the data is missing or damaged, the directory holds another run, a checkpoint cannot be written
            or read, or the loss is no longer finite. Complete checkpoints are kept in every case.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    data = open_token_data(config.data)
    check_token_data(data, config)
    _check_wandb(config)
    suite = _load_tasks(config, data)
    directory = RunDirectory(config)
    with ExitStack() as stack:
        processes = stack.enter_context(join_processes(config))
        stack.enter_context(_quiet_engine(verbose))
        if config.trainer.deterministic:
            stack.enter_context(deterministic_algorithms())

        def claim() -> tuple[int | None, ModelStatistics]:
            stack.enter_context(directory.locked())
            return directory.claim(overwrite), directory.describe(data, processes.device, processes.count)

        step, statistics = processes.on_first(claim)
        if step == config.trainer.total_steps:
            return RunResult(directory.path, step, "already finished")
        if step is not None:
            check_stored_model(directory.checkpoint(step) / "model_and_optim", config.model)
        if processes.rank == 0:
            _announce(console, config, statistics, data, processes, step)
        weights = None
        if step is None and config.trainer.initial_weights is not None:
            weights = read_weights(config.trainer.initial_weights, config.model)
        trainer = build_trainer(config, data, suite, processes, console)
        if step is not None:
            _load(trainer, directory.checkpoint(step))
        elif weights is not None:
            load_weights(trainer.train_module.model, weights)
        _fit(trainer, directory)
        finished = trainer.global_step >= config.trainer.total_steps
        return RunResult(directory.path, trainer.global_step, "finished" if finished else "interrupted")


class TrainModule(TransformerTrainModule):
    """OLMo-core's, without the dry run of a made-up batch before training, which would be counted in metrics."""

    def train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None:
        """As in OLMo-core."""
        if not dry_run:
            super().train_batch(batch)


def build_trainer(
    config: RunConfig, data: TokenData, suite: TaskSuite | None, processes: Processes, console: Console
) -> Trainer:
    """OLMo-core's trainer with everything in it, at the first step."""
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
        # Also without a limit the norm is wanted, as a metric.
        max_grad_norm=float("inf") if optimizer.max_grad_norm is None else optimizer.max_grad_norm,
        scheduler=build_scheduler(config.schedule, optimizer.learning_rate, trainer.total_steps, config.model.memory),
        device=processes.device,
    )
    checkpoints = Checkpoints(save_interval=trainer.checkpoint_interval, max_checkpoints=trainer.keep_checkpoints)
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
        callbacks["tasks"] = TaskEvaluation(suite, trainer.evaluate_tasks_interval, trainer.total_steps, checkpoints)
    if config.logging.tensorboard:
        callbacks["tensorboard"] = TensorBoard(trainer.directory / "tensorboard")
    if config.logging.wandb is not None:
        callbacks["wandb"] = _wandb(config)
    return TrainerConfig(
        save_folder=str(trainer.directory),
        load_strategy=LoadStrategy.never,  # `train` has found the checkpoint already
        device=str(processes.device),
        max_duration=Duration.steps(trainer.total_steps),
        # To look for a signal in all processes they have to wait for each other, which GPUs should not at every step.
        cancel_check_interval=trainer.metrics_interval if processes.count > 1 and module.device.type == "cuda" else 1,
        metrics_collect_interval=trainer.metrics_interval,
        async_bookkeeping=False,  # so that a loss that is not finite is seen before a checkpoint is written
        callbacks=callbacks,
    ).build(module, build_data_loader(data, config, processes.device, module.dp_process_group))


def _heldout_evaluation(
    config: RunConfig, data: TokenData, module: TrainModule, micro_batch_size: int
) -> HeldoutEvaluation:
    trainer, length, group = config.trainer, config.data.sequence_length, module.dp_process_group
    windows = TokenWindows(data.heldout, data.dtype, data.vocab_size, length, trainer.evaluate_tokens)
    batches = HeldoutBatches(windows, micro_batch_size // length, group)
    evaluator = HeldoutEvaluator(batches, data.heldout_bytes_per_token, module.device, group)
    return HeldoutEvaluation(
        evaluators=[evaluator], eval_interval=trainer.evaluate_interval, fixed_steps=[trainer.total_steps]
    )


def _load_tasks(config: RunConfig, data: TokenData) -> TaskSuite | None:
    """The tasks to evaluate on, before anything is written."""
    trainer = config.trainer
    if not trainer.evaluate_tasks:
        return None
    try:
        names = task_names(trainer.evaluate_tasks)
    except ConfigError as error:
        raise ConfigError(f"trainer.evaluate_{error}") from error
    if data.tokenizer is None:
        raise UltraMemError(
            "trainer.evaluate_tasks: needs a tokenizer, and data.train_files come without one; name a data.directory, "
            "or leave the tasks out"
        )
    tokenizer = load_model_tokenizer(data.tokenizer, data.eos_token_id, config.model.vocab_size)
    return TaskSuite(names, tokenizer, config.data.sequence_length, trainer.evaluate_tasks_questions)


def _check_wandb(config: RunConfig) -> None:
    if config.logging.wandb is None:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UltraMemError("logging.wandb: the package wandb is not installed; install it with: pip install wandb")
    if "WANDB_API_KEY" not in os.environ and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        raise UltraMemError("logging.wandb: set WANDB_API_KEY, or WANDB_MODE=offline, in the environment")


def _wandb(config: RunConfig) -> WeightsAndBiases:
    assert config.logging.wandb is not None
    os.environ.setdefault("WANDB_API_KEY", "none: offline")  # OLMo-core wants one in any case
    return WeightsAndBiases(
        project=config.logging.wandb.project,
        entity=config.logging.wandb.entity,
        name=config.trainer.directory.name,
        config=encode(config),
        cancel_tags=None,
    )


def _announce(
    console: Console,
    config: RunConfig,
    statistics: ModelStatistics,
    data: TokenData,
    processes: Processes,
    step: int | None,
) -> None:
    count = "" if processes.count == 1 else f", {processes.count} processes"
    console.print(
        f"{config.model.system}: {statistics.active / 1e6:,.1f} M active of {statistics.total / 1e6:,.1f} M "
        f"parameters; {config.trainer.total_steps:,} steps of {config.trainer.batch_size:,} tokens on "
        f"{processes.device.type}{count}"
    )
    console.print(f"run directory: {escape(str(config.trainer.directory))}")
    if not data.heldout:
        console.print("no held-out data: no evaluation during training")
    if step is not None:
        console.print(f"going on from step {step:,}")


def _load(trainer: Trainer, checkpoint: Path) -> None:
    """Load a checkpoint; trainer state is unpickled with plain types only."""
    try:
        # Every `torch.load`, OLMo-core's too, shall refuse pickles that hold more than data.
        weights_only = environment_variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
        with weights_only, torch.serialization.safe_globals(_STATE_TYPES):
            trainer.load_checkpoint(checkpoint, load_trainer_state=True, load_optim_state=True)
    except (Exception, CheckpointException) as error:
        if "fingerprint" in str(error):
            raise UltraMemError(
                f"the training data has changed since {checkpoint} was written; bring it back, or start another run"
            ) from error
        lines = (str(error).strip() or type(error).__name__).splitlines()
        reason = lines[-1 if isinstance(error, CheckpointException) else 0]  # the former begins with a traceback
        raise UltraMemError(
            f"{checkpoint} is damaged ({reason}); remove that directory to go on from the checkpoint before it"
        ) from error


def _fit(trainer: Trainer, directory: RunDirectory) -> None:
    """Train; errors that are the user's, or the machine's, say what is left."""
    try:
        trainer.fit()
    except torch.OutOfMemoryError as error:
        raise UltraMemError(
            "the GPU is out of memory; lower trainer.micro_batch_size, or set trainer.activation_checkpointing=true"
        ) from error
    except (UltraMemError, OSError, RuntimeError) as error:
        described = _describe(error)
        if described is None:
            raise
        latest = directory.latest_step()
        left = (
            "there is no checkpoint"
            if latest is None
            else f"the last good checkpoint is {directory.checkpoint(latest)}"
        )
        raise UltraMemError(f"{described}; {left}") from error


def _describe(error: Exception) -> str | None:
    """What went wrong and what to do, or None for an error that is neither the user's nor the machine's."""
    not_finite = re.fullmatch(r"(\S+) loss encountered at step (\d+)", str(error))  # OLMo-core's words
    if not_finite is not None:
        error = DivergedError("loss", float(not_finite[1]), int(not_finite[2]))
    if isinstance(error, DivergedError):
        return f"{error}: try a new run with a lower optimizer.learning_rate"
    if isinstance(error, UltraMemError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be written ({error.strerror}): make room and run the same command again"
    return None


@contextmanager
def _quiet_engine(verbose: bool) -> Iterator[None]:
    """Let OLMo-core log what `train` does not say itself, or everything; undo what it sets for the whole process."""
    logger = logging.getLogger("olmo_core" if verbose else "olmo_core.train.trainer")
    level, handler = logger.level, logging.StreamHandler()
    logger.setLevel(logging.INFO if verbose else logging.CRITICAL)
    if verbose:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            for known in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", known)
            yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
