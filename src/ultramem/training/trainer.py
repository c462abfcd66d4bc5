"""OLMo-core's trainer, with the model, its optimizer, the data and the callbacks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from olmo_core.data import DataCollator, DataLoaderBase, NumpyFSLDataLoader, NumpyFSLDataset
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.train import Duration, LoadStrategy, Trainer, TrainerConfig
from olmo_core.train.callbacks import Callback, SpeedMonitorCallback
from olmo_core.train.train_module import TransformerActivationCheckpointingConfig, TransformerTrainModule
from rich.console import Console
from torch.distributed.tensor import DTensor

from ultramem.configuration.decoding import encode
from ultramem.data.token_sequences import TokenSequences
from ultramem.evaluation.tasks import TaskSuite
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.runs.config import RunConfig
from ultramem.runs.layout import METRICS_NAME, TABLE_GRADIENT_NORM
from ultramem.runs.tokens import TokenData
from ultramem.tables.trainable import TrainableTable
from ultramem.training.checkpointer import CheckpointerConfig
from ultramem.training.checkpoints import Checkpoints
from ultramem.training.evaluation import HeldoutBatches, HeldoutCallback, HeldoutEvaluator, TaskCallback
from ultramem.training.graphs import GraphedPasses
from ultramem.training.metrics import LayerMetrics, MetricsFile, ProgressReport, TensorBoard, WeightsAndBiases
from ultramem.training.optimizer import build_scheduler, optimizer_config
from ultramem.training.processes import Processes
from ultramem.training.reproducible import StepSeed
from ultramem.training.stopping import StopOnSignal, StopWhenDiverged


class TrainModule(TransformerTrainModule):
    """OLMo-core's module without the dry run before training, whose made-up batch would count in metrics.

    Clipping leaves out tables with the row-wise optimizer, whose step does not depend on the scale of the gradient.

    Attributes:
        passes: replays passes as CUDA graphs; None to launch them kernel by kernel.
    """

    passes: GraphedPasses | None = None

    def train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None:
        """As in OLMo-core."""
        if not dry_run:
            super().train_batch(batch)

    def model_forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options: Any) -> Any:
        """As in OLMo-core; of a replayed pass the loss has been propagated backward already."""
        if self.passes is None or not torch.is_grad_enabled():
            return super().model_forward(input_ids, labels=labels, **options)
        assert labels is not None
        inputs = {"input_ids": input_ids, "labels": labels, "loss_div_factor": options.pop("loss_div_factor")}
        return self.passes(inputs, options)

    def replay_passes(self, tables: list[TrainableTable], notify: Callable[[str], None]) -> None:
        """Replay passes as CUDA graphs where possible; arguments as of `GraphedPasses`."""
        self.passes = GraphedPasses(self.model, super().model_forward, tables, notify)

    def optim_step(self) -> None:
        """As in OLMo-core, and record the norm of the gradient of tables with the row-wise optimizer."""
        if self.passes is not None and not self.optim.state:
            torch.cuda.empty_cache()  # or its state lies in the memory of the first passes, which then stays reserved
        super().optim_step()
        if self._rowwise:
            norm = self.optim.table_norm()
            if any(isinstance(parameter, DTensor) for parameter in self._rowwise):
                norm = norm.square()
                dist.all_reduce(norm, group=self.dp_process_group)
                norm = norm.sqrt()
            self.trainer.record_metric(TABLE_GRADIENT_NORM, norm, reduce_type=None)

    def _clip_grad_norm(self, *arguments: Any, **options: Any) -> torch.Tensor:
        gradients = [parameter.grad for parameter in self._rowwise]
        for parameter in self._rowwise:
            parameter.grad = None
        norm = super()._clip_grad_norm(*arguments, **options)
        for parameter, gradient in zip(self._rowwise, gradients, strict=True):
            parameter.grad = gradient
        return norm

    @property
    def _rowwise(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.optim.param_groups if group.get("rowwise") for parameter in group["params"]]


class DataLoader(NumpyFSLDataLoader):
    """OLMo-core's, with the order of an epoch's sequences in memory: 4 bytes for each, in every process.

    OLMo-core writes it to a file through a memory map, which ends the process when the disk is full, and believes any
    file that it finds there.
    """

    def build_and_save_global_indices(self, in_memory: bool = True) -> None:
        """Make the order, which depends on seed, epoch and number of sequences alone."""
        super().build_and_save_global_indices(in_memory=True)


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
        compile_model=processes.compiles,
        dp_config=processes.data_parallel,
        ac_config=TransformerActivationCheckpointingConfig() if trainer.activation_checkpointing else None,
        autocast_precision=processes.autocast,
        # The norm is a metric even without clipping.
        max_grad_norm=float("inf") if optimizer.max_grad_norm is None else optimizer.max_grad_norm,
        scheduler=build_scheduler(config.schedule, optimizer.learning_rate, trainer.total_steps, config.model.memory),
        device=processes.device,
    )
    if processes.data_parallel is None:
        memory = model.memory
        tables = [table for table in memory.tables if isinstance(table, TrainableTable)] if memory is not None else []
        if memory is not None and memory.config.optimizer == "rowwise":
            module.optim.take_over(tables, defer=micro_batch_size == trainer.batch_size)
        if trainer.cuda_graphs and processes.device.type == "cuda":
            module.replay_passes(tables, console.print)
    checkpoints = Checkpoints(
        save_interval=trainer.checkpoint_interval,
        max_checkpoints=trainer.keep_checkpoints,
        save_async=trainer.async_checkpoints,
    )
    callbacks: dict[str, Callback] = {
        "checkpointer": checkpoints,
        "layer_metrics": LayerMetrics(module.model, trainer.memory_metrics_interval),
        "metrics_file": MetricsFile(trainer.directory / METRICS_NAME, _table_bytes(model, processes.autocast)),
        "speed_monitor": SpeedMonitorCallback(device_peak_flops_per_second=_peak_flops(processes)),
        "step_seed": StepSeed(trainer.seed),
        "stop_on_signal": StopOnSignal(console),
        "stop_when_diverged": StopWhenDiverged(),
    }
    if processes.rank == 0:
        callbacks["progress"] = ProgressReport(console, trainer.metrics_interval)
    if data.heldout and trainer.evaluate_interval is not None:
        callbacks["heldout"] = _heldout_evaluation(config, data, module, micro_batch_size)
    if suite is not None:
        callbacks["tasks"] = TaskCallback(
            suite, trainer.evaluate_tasks_interval, trainer.total_steps, checkpoints, trainer.directory / METRICS_NAME
        )
    if config.logging.tensorboard:
        callbacks["tensorboard"] = TensorBoard(trainer.directory / "tensorboard")
    if config.logging.wandb is not None:
        os.environ.setdefault("WANDB_API_KEY", "none: offline")  # OLMo-core always needs one
        callbacks["wandb"] = WeightsAndBiases(
            project=config.logging.wandb.project,
            entity=config.logging.wandb.entity,
            name=trainer.directory.name,
            config=encode(config),
            cancel_tags=None,
        )
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


def _table_bytes(model: MemoryTransformer, autocast: torch.dtype | None) -> int:
    """Bytes of tables that a token reads in a forward pass."""
    layers = [] if model.memory is None else model.memory.layers
    dtypes = [autocast or next(layer.table.parameters()).dtype for layer in layers]
    return sum(layer.numbers_read * dtype.itemsize for layer, dtype in zip(layers, dtypes, strict=True))


def _peak_flops(processes: Processes) -> int | None:
    """Of GPUs that OLMo-core does not know, in bfloat16 without sparsity; None leaves it to OLMo-core."""
    if processes.autocast is None or processes.device.type != "cuda":
        return None
    # The vendor's data sheet: as an H100.
    return int(989e12) if "H200" in torch.cuda.get_device_name(processes.device) else None


def build_data_loader(
    data: TokenData, config: RunConfig, device: torch.device, group: dist.ProcessGroup | None
) -> DataLoaderBase:
    """Batches of shuffled training sequences; the order depends on the seed, not on the number of processes."""
    dataset = NumpyFSLDataset(
        *data.train,
        sequence_length=config.data.sequence_length,
        pad_token_id=data.eos_token_id,
        eos_token_id=data.eos_token_id,
        vocab_size=data.vocab_size,
        dtype=np.uint16 if data.dtype == "uint16" else np.uint32,
        include_instance_metadata=False,
    )
    return DataLoader(
        dataset,
        collator=DataCollator(pad_token_id=data.eos_token_id, vocab_size=data.vocab_size),
        global_batch_size=config.trainer.batch_size,
        seed=config.trainer.seed,
        work_dir=config.trainer.directory,  # nothing is written there
        target_device_type=device.type,
        dp_world_size=get_world_size(group),
        dp_rank=get_rank(group),
    )


def _heldout_evaluation(
    config: RunConfig, data: TokenData, module: TrainModule, micro_batch_size: int
) -> HeldoutCallback:
    trainer, length, group = config.trainer, config.data.sequence_length, module.dp_process_group
    sequences = TokenSequences(data.heldout, data.dtype, data.vocab_size, length, trainer.evaluate_tokens)
    batches = HeldoutBatches(sequences, micro_batch_size // length, group)
    evaluator = HeldoutEvaluator(batches, data.heldout_bytes_per_token, module.device, group)
    return HeldoutCallback(
        evaluators=[evaluator],
        eval_interval=trainer.evaluate_interval,
        fixed_steps=[trainer.total_steps],
        metrics_file=trainer.directory / METRICS_NAME,
    )
