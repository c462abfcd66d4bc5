"""The processes of a run and their devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from olmo_core.config import DType
from olmo_core.distributed import parallel
from olmo_core.distributed.utils import (
    all_gather_object,
    broadcast_object,
    get_rank,
    get_world_size,
    init_distributed,
)
from olmo_core.train.train_module import TransformerDataParallelConfig

from ultramem.device import choose_device, has_fast_bfloat16
from ultramem.errors import ConfigError, UltraMemError, system_reason
from ultramem.runs.config import RunConfig, TrainerConfig
from ultramem.training.launch import check_launch, environment_number, launched_processes

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The rank and device of this process, and how the run's processes train together.

    Attributes:
        rank: rank of this process.
        count: number of processes.
        device: device of this process.
        autocast: dtype of autocast, or None for none.
        compiles: whether to compile the model.
        data_parallel: OLMo-core's configuration; None for a single process.
    """

    rank: int
    count: int
    device: torch.device
    autocast: torch.dtype | None
    compiles: bool
    data_parallel: TransformerDataParallelConfig | None

    def on_first(self, function: Callable[[], T]) -> T:
        """Call `function` in the first process; all get its result, or its error if of the user or file system."""
        outcome: tuple[T | None, str | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = (function(), None)
            except OSError as error:
                outcome = (None, f"{error.filename or 'a file'} cannot be written or read: {system_reason(error)}")
            except UltraMemError as error:
                outcome = (None, str(error))
        result, message = broadcast_object(outcome)
        if message is not None:
            raise UltraMemError(message)
        return result


def in_all(function: Callable[[], T]) -> T:
    """Call `function` in every process; if it raises an `UltraMemError` in one, all raise it."""
    outcome: T | UltraMemError
    try:
        outcome = function()
    except UltraMemError as error:
        outcome = error
    for failure in all_gather_object(outcome if isinstance(outcome, UltraMemError) else None):
        if failure is not None:
            raise failure
    return cast(T, outcome)


@contextmanager
def join_processes(config: RunConfig) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it started any.

    Raises:
        ConfigError: the configuration does not fit the machine or the number of processes.
    """
    trainer = config.trainer
    started = None if dist.is_initialized() else launched_processes()
    joins, count = started is not None, started or get_world_size()
    device = _device(trainer)
    data_parallel = _data_parallel(config, count, joins or dist.is_initialized())
    _check_batch(config, count)
    if joins and count > 1:
        check_launch()
    if joins:
        with redirect_stdout(StringIO()):  # it prints what it does
            init_distributed("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        bfloat16 = has_fast_bfloat16(device) if trainer.precision == "auto" else trainer.precision == "bfloat16"
        autocast = torch.bfloat16 if bfloat16 else None
        compiles = device.type == "cuda" if trainer.compile is None else trainer.compile
        yield Processes(get_rank(), count, device, autocast, compiles, data_parallel)
    finally:
        parallel._WORLD_MESH = None  # OLMo-core refuses to make a second one, which a notebook's next run needs
        if joins:
            dist.destroy_process_group()


def _device(trainer: TrainerConfig) -> torch.device:
    try:
        device = choose_device(trainer.device)
    except ConfigError as error:
        raise ConfigError(f"trainer.{error}") from error
    if device.type == "cpu":
        if trainer.compile:
            raise ConfigError("trainer.compile=True: needs a CUDA device; leave it out")
        return device
    number, count = environment_number("LOCAL_RANK") or 0, torch.cuda.device_count()
    if number >= count:
        raise ConfigError(f"LOCAL_RANK={number}: must be below {count}, the number of GPUs; start fewer processes")
    return torch.device("cuda", number)


def _data_parallel(config: RunConfig, count: int, launched: bool) -> TransformerDataParallelConfig | None:
    name, memory = config.trainer.parallel, config.model.memory
    if name == "auto":
        name = "fsdp" if count > 1 else "none"
    if name == "fsdp" and memory is not None and memory.table_dtype == "bfloat16":
        raise ConfigError(
            f"trainer.parallel={config.trainer.parallel}: fsdp shards parameters of one dtype together, and "
            "model.memory.table_dtype=bfloat16 gives tables another; set trainer.parallel=ddp, or leave out table_dtype"
        )
    if name == "none":
        if count > 1:
            raise ConfigError(f"trainer.parallel=none: needs a single process, but there are {count}; use fsdp or ddp")
        return None
    if not launched:
        raise ConfigError(f"trainer.parallel={name}: needs torchrun; start with it, or use auto")
    return TransformerDataParallelConfig(name=parallel.DataParallelType(name), reduce_dtype=DType.float32)


def _check_batch(config: RunConfig, count: int) -> None:
    batch, length = config.trainer.batch_size, config.data.sequence_length
    if batch % (count * length):
        raise ConfigError(
            f"trainer.batch_size={batch}: must be a multiple of data.sequence_length={length} times the {count} "
            f"processes, such as {max(round(batch / (count * length)), 1) * count * length}"
        )
    micro_batch = config.trainer.micro_batch_size
    if micro_batch is not None and batch // count % micro_batch:
        raise ConfigError(
            f"trainer.micro_batch_size={micro_batch}: must divide each process's share of the batch, "
            f"{batch // count} tokens"
        )
