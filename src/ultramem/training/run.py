"""A training run, from its configuration to its last checkpoint."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.train import Trainer
from rich.console import Console
from rich.markup import escape

from ultramem.convert.initial_weights import load_weights, read_model_config
from ultramem.data.tokenizers import load_model_tokenizer
from ultramem.device import check_memory, keep_freed_memory
from ultramem.errors import ConfigError, UltraMemError, explain, system_reason
from ultramem.evaluation.tasks import TaskSuite, task_names
from ultramem.files.checksums import DamagedFileError
from ultramem.hosts.olmo_core.sizes import bytes_to_train
from ultramem.hosts.weights import check_finite_weights
from ultramem.runs import config_files
from ultramem.runs.checkpoints import checkpoint_name
from ultramem.runs.config import RunConfig
from ultramem.runs.contents import DataContents
from ultramem.runs.directory import RunDirectory
from ultramem.runs.tokens import TokenData, check_token_data, open_token_data
from ultramem.training.checkpoints import load_checkpoint
from ultramem.training.launch import environment_number
from ultramem.training.processes import Processes, in_all, join_processes
from ultramem.training.reproducible import deterministic_algorithms
from ultramem.training.stopping import DivergedError
from ultramem.training.trainer import build_trainer

# Warnings of PyTorch about what OLMo-core does on purpose, and of FSDP about views that are never changed in place.
_KNOWN_WARNINGS = (
    "called a synchronizing CUDA operation",
    "torch.distributed is disabled, unavailable or uninitialized",
    "DTensor random operators may not have complete support on cpu",
    "FSDP2-wrapped module .* returned a view tensor",
)


@dataclass(frozen=True)
class RunResult:
    """The run directory, the last step, which has a checkpoint, and how the call of `train` ended.

    The status is `interrupted` after a signal, and `already finished` if the run was so before the call.
    """

    directory: Path
    step: int
    status: Literal["finished", "interrupted", "already finished"]


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file. If its model section does not describe a model, the model is that of the initial weights.

    Overrides are such as `--optimizer.learning_rate=3e-4` or `model.memory=null`; values are YAML.

    Raises:
        ConfigError: the file is missing or not valid, or a key or value is invalid.
        UltraMemError: what the configuration leaves to the data or the initial weights cannot be read from them.
    """
    return config_files.load_config(path, overrides, read_model_config)


def train(
    config: RunConfig,
    *,
    overwrite: bool = False,
    from_checkpoint: str | None = None,
    verbose: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Train a model to the last step, or resume an interrupted run.

    A resumed run continues from its latest complete checkpoint exactly as if it had not been interrupted. If that one
    is damaged, it is renamed to `stepN.damaged`, and the run continues from the latest good one. With torchrun all
    processes call this function.

    Args:
        config: configuration of the run.
        overwrite: whether to replace any run in the directory, including this one.
        from_checkpoint: name of the checkpoint to continue from, such as `step400`, also of a finished run. Later
            checkpoints are renamed to `stepN.unused`, and `metrics.jsonl` with later steps to `metrics.jsonl.unused`.
        verbose: whether to show OLMo-core's log.
        console: console for progress; by default standard output.

    Raises:
        ConfigError: the configuration does not fit the machine, the data or the number of processes.
        UltraMemError: the data is missing or damaged, the directory holds another run or not that checkpoint, a
            checkpoint cannot be written or read, or the loss or gradient is not finite. Complete checkpoints are always
            kept.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    if overwrite and from_checkpoint is not None:
        raise ConfigError(
            f"--from-checkpoint={from_checkpoint}: does not apply with --overwrite; leave out one of them"
        )
    config = config if overwrite else config_files.as_begun(config)
    data = open_token_data(config.data)
    check_token_data(data, config)
    _check_wandb(config)
    suite = _load_tasks(config, data)  # so that errors come before anything is written
    directory = RunDirectory(config)
    with ExitStack() as stack:
        processes = stack.enter_context(join_processes(config))
        _check_memory(config, processes)
        if processes.device.type == "cpu":
            keep_freed_memory()
        stack.enter_context(_quiet_engine(verbose))
        if processes.compiles:
            torch.compiler.reset()  # what an earlier run of this process left would change what is compiled now
        if config.trainer.deterministic:
            stack.enter_context(deterministic_algorithms())

        def check() -> tuple[int | None, DataContents | None]:
            stack.enter_context(directory.locked())
            latest = directory.find_step(overwrite)
            step = latest if from_checkpoint is None else directory.step_of(from_checkpoint)
            if directory.is_finished(step, bool(data.heldout)):
                return step, None
            directory.check_room(overwrite)
            contents = DataContents.of(data, config.data.verify)
            directory.check_data(data, contents, overwrite)
            return step, contents

        step, contents = processes.on_first(check)
        if step is not None and contents is None:
            return RunResult(directory.path, step, "already finished")
        if processes.rank == 0:
            _announce(console, directory, data, processes)
        trainer = build_trainer(config, data, suite, processes, console)
        if step is not None:
            step = _resume(trainer, directory, step, from_checkpoint is not None, processes, console)
        elif config.trainer.initial_weights is not None:
            load_weights(trainer.train_module.model, config.trainer.initial_weights, config.model)

        def claim() -> None:
            assert contents is not None
            ending = "damaged" if from_checkpoint is None else "unused"
            if step is not None and (moved := directory.put_aside(step, ending)):
                console.print(f"kept as {', '.join(moved)}")
            directory.claim(overwrite)
            directory.describe(data, contents, processes.device, processes.count)
            if overwrite and (others := directory.others()):
                more = "" if len(others) <= 5 else f" and {len(others) - 5} more"
                console.print(f"kept, as ultramem did not write it: {escape(', '.join(others[:5]))}{more}")

        processes.on_first(claim)  # at the last moment: from here on, only training itself can fail
        _fit(trainer, directory)
        complete = trainer.global_step >= config.trainer.total_steps
        return RunResult(directory.path, trainer.global_step, "finished" if complete else "interrupted")


def _check_memory(config: RunConfig, processes: Processes) -> None:
    """Refuse what cannot fit before anything is written: the state after a step, and the largest activations in it."""
    sharded = processes.data_parallel is not None and processes.data_parallel.name == DataParallelType.fsdp
    # On a CPU all processes of the machine share its memory.
    alone = processes.device.type == "cuda" or processes.count == 1
    together = 1 if alone else environment_number("LOCAL_WORLD_SIZE") or 1
    share = together / processes.count if sharded else together
    check_memory(bytes_to_train(config.model, share), processes.device)
    batch, length = config.trainer.batch_size // processes.count, config.data.sequence_length
    tokens = config.trainer.micro_batch_size or batch
    what = f"data.sequence_length={length}" if tokens == length else f"trainer.micro_batch_size={tokens}"
    # The logits, and the residual stream at each block.
    width = config.model.vocab_size + config.model.num_blocks * config.model.d_model
    check_memory({what: tokens * width * together * (2 if processes.autocast else 4)}, processes.device)


def _load_tasks(config: RunConfig, data: TokenData) -> TaskSuite | None:
    trainer, interval = config.trainer, config.trainer.evaluate_tasks_interval
    if not trainer.evaluate_tasks:
        if interval is not None:
            raise ConfigError(
                f"trainer.evaluate_tasks_interval={interval}: needs tasks; set trainer.evaluate_tasks, or leave it out"
            )
        return None
    try:
        names = task_names(trainer.evaluate_tasks)
    except ConfigError as error:
        raise ConfigError(f"trainer.evaluate_{error}") from error
    if data.tokenizer is None:
        raise UltraMemError(
            "trainer.evaluate_tasks: needs a tokenizer, which data.train_files do not have; use data.directory, or "
            "leave the tasks out"
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


def _announce(console: Console, directory: RunDirectory, data: TokenData, processes: Processes) -> None:
    config, statistics = directory.config, directory.statistics
    count = "" if processes.count == 1 else f", {processes.count} processes"
    console.print(
        f"{config.model.system}: {statistics.active / 1e6:,.1f} M active of {statistics.total / 1e6:,.1f} M "
        f"parameters (embeddings included); {config.trainer.total_steps:,} steps of {config.trainer.batch_size:,} "
        f"tokens on {processes.device.type}{count}"
    )
    console.print(f"run directory: {escape(str(config.trainer.directory))}")
    if processes.compiles:
        console.print("compiling: the first steps take a minute or two")
    if not data.heldout:
        console.print("no held-out data, so no evaluation during training")


def _resume(
    trainer: Trainer, directory: RunDirectory, step: int, chosen: bool, processes: Processes, console: Console
) -> int:
    """Load the checkpoint of a step, or the latest good one before it unless the user chose it; return its step."""
    while True:
        try:
            load_checkpoint(trainer, directory.checkpoint(step), directory.config.model)
            break
        except DamagedFileError as error:
            earlier = processes.on_first(partial(directory.step_before, step))
            if earlier is None:
                raise UltraMemError(
                    f"{error}; there is no earlier checkpoint, so start again with --overwrite"
                ) from error
            name = checkpoint_name(earlier)
            if chosen:
                raise UltraMemError(f"{error}; use an earlier one: --from-checkpoint {name}") from error
            if processes.rank == 0:
                console.print(f"{checkpoint_name(step)} is damaged ({escape(str(error))}); resuming from {name}")
            step = earlier
    in_all(lambda: check_finite_weights(trainer.train_module.model.state_dict(), directory.checkpoint(step)))
    if processes.rank == 0:
        console.print(f"resuming from step {step:,}")
    return step


def _fit(trainer: Trainer, directory: RunDirectory) -> None:
    """Train. Errors of the user or the machine name the last good checkpoint."""
    first = trainer.global_step + 1
    try:
        trainer.fit()
    except torch.OutOfMemoryError as error:
        raise UltraMemError(
            "the GPU is out of memory; lower trainer.micro_batch_size, or set trainer.activation_checkpointing=true"
        ) from error
    except (UltraMemError, OSError, RuntimeError) as error:
        described = _describe(error, first)
        if described is None:
            raise
        latest = directory.latest_step()
        left = "there is no checkpoint yet"
        if latest is not None:
            left = f"the last good checkpoint is {directory.checkpoint(latest)}"
        raise UltraMemError(f"{described}; {left}") from error


def _describe(error: Exception, first: int) -> str | None:
    """What is wrong and what to do; None for an error that is neither the user's nor the machine's.

    Args:
        error: the error.
        first: first step of this call.
    """
    not_finite = re.fullmatch(r"(\S+) loss encountered at step (\d+)", str(error))  # OLMo-core's words
    if not_finite is not None:
        error = DivergedError("loss", float(not_finite[1]), int(not_finite[2]))
    if isinstance(error, DivergedError):
        if error.step == first:  # nothing has been learnt yet
            return f"{error}, the first: check the weights that it started from, and the model's sizes and init_std"
        return f"{error}; start a new run with a lower optimizer.learning_rate"
    if isinstance(error, OSError):
        name, reason = error.filename or "a file", system_reason(error)
        return f"{name} cannot be written ({reason}); free some space and run the same command again"
    return explain(error)


@contextmanager
def _quiet_engine(verbose: bool) -> Iterator[None]:
    """Let OLMo-core log what `train` does not show itself, or everything; restore the settings afterwards."""
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
