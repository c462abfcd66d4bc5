"""AdamW with a separate learning rate for the values of memory tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from olmo_core import optim
from olmo_core.train import Trainer

from ultramem.config import MemoryConfig
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.runs.config import OptimizerConfig, ScheduleConfig
from ultramem.runs.layout import LEARNING_RATES
from ultramem.tables.rowwise import RowwiseAdamW

GROUP_FLAG = "memory_values"  # marks a parameter group as values and pre-values of memory tables


@dataclass
class RowwiseAdamWConfig(optim.OptimConfig[RowwiseAdamW]):
    """OLMo-core's configuration of `RowwiseAdamW`."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    fused: bool = True
    seed: int = 0

    @classmethod
    def optimizer(cls) -> type[RowwiseAdamW]:
        """The class that this describes."""
        return RowwiseAdamW


def optimizer_config(config: OptimizerConfig, model: MemoryTransformer) -> RowwiseAdamWConfig:
    """Configuration of the optimizer, with a parameter group for the tables' values if the model has any."""
    overrides = []
    if model.memory is not None and model.memory.layers:
        memory = model.memory.config
        decay = config.weight_decay if config.value_weight_decay is None else config.value_weight_decay
        options = {GROUP_FLAG: True, "weight_decay": decay}
        if memory.optimizer == "rowwise":
            options |= {"rowwise": True, "row_beta": memory.row_beta}
        overrides = [optim.OptimGroupOverride([f"memory.{name}" for name in model.memory.value_parameters()], options)]
    return RowwiseAdamWConfig(
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        group_overrides=overrides or None,
        seed=model.init_seed,
    )


def build_scheduler(
    config: ScheduleConfig, learning_rate: float, total_steps: int, memory: MemoryConfig | None
) -> optim.Scheduler:
    """Build the schedule of the learning rate, which peaks at `learning_rate`, and that of the tables' values."""
    warmup: dict[str, Any] = (
        {"warmup_fraction": config.warmup_share} if config.warmup_steps is None else {"warmup": config.warmup_steps}
    )
    if config.kind == "constant":
        schedule: optim.Scheduler = optim.ConstantWithWarmup(**warmup)
    elif config.kind == "wsd":
        decay = max(round(config.decay_share * total_steps), 1)  # OLMo-core divides by it
        schedule = optim.WSD(
            **warmup, decay=decay, decay_fraction=None, decay_min_lr=config.final_share * learning_rate
        )
    else:
        kinds = {"cosine": optim.CosWithWarmup, "linear": optim.LinearWithWarmup}
        schedule = kinds[config.kind](**warmup, alpha_f=config.final_share)
    return ModelAndValuesScheduler(schedule=schedule, memory=memory)


@dataclass
class ModelAndValuesScheduler(optim.Scheduler):
    """A schedule for the model, and one derived from it for the values of memory tables.

    With `value_lr_multiplier` m and `value_lr_decay` d the values' learning rate is
    `1 + (m - 1) * max(0, 1 - step / (max_steps * d))` times the model's (UltraMem, arXiv:2411.12364). With `value_lr`
    it is that constant.
    """

    schedule: optim.Scheduler | None = None
    memory: MemoryConfig | None = None

    def get_lr(self, initial_lr: Any, current: int, t_max: int) -> Any:
        """The model's learning rate."""
        assert self.schedule is not None
        return self.schedule.get_lr(initial_lr, current, t_max)

    def set_lr(self, group: dict[str, Any], trainer: Trainer) -> Any:
        """Set the learning rate of a parameter group, and record it as a metric."""
        learning_rate = super().set_lr(group, trainer)
        if of_values := group.get(GROUP_FLAG):
            assert self.memory is not None
            assert trainer.max_steps is not None
            learning_rate *= self.memory.value_lr_factor(trainer.global_step, trainer.max_steps)
            if self.memory.value_lr is not None:
                learning_rate = self.memory.value_lr
            group[self.lr_field] = learning_rate
        trainer.record_metric(LEARNING_RATES["values" if of_values else "model"], learning_rate)
        return learning_rate
