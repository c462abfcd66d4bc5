"""Training runs, which can be interrupted and resumed."""

from ultramem.runs.config import (
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainerConfig,
    WandbConfig,
)
from ultramem.training.run import RunResult, load_config, train

__all__ = [
    "DataConfig",
    "LoggingConfig",
    "OptimizerConfig",
    "RunConfig",
    "RunResult",
    "ScheduleConfig",
    "TrainerConfig",
    "WandbConfig",
    "load_config",
    "train",
]
