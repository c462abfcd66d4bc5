"""Callbacks of OLMo-core's trainer: what a run does besides training, one subject per file."""

from ultramem.training.callbacks.checkpoints import Checkpoints
from ultramem.training.callbacks.divergence import DivergedError, StopWhenDiverged
from ultramem.training.callbacks.evaluation import HeldoutCallback, TaskCallback
from ultramem.training.callbacks.layer_metrics import LayerMetrics
from ultramem.training.callbacks.metrics_file import MetricsFile
from ultramem.training.callbacks.progress import ProgressReport
from ultramem.training.callbacks.signals import StopOnSignal
from ultramem.training.callbacks.step_seed import StepSeed
from ultramem.training.callbacks.tensorboard import TensorBoard
from ultramem.training.callbacks.weights_and_biases import WeightsAndBiases

__all__ = [
    "Checkpoints",
    "DivergedError",
    "HeldoutCallback",
    "LayerMetrics",
    "MetricsFile",
    "ProgressReport",
    "StepSeed",
    "StopOnSignal",
    "StopWhenDiverged",
    "TaskCallback",
    "TensorBoard",
    "WeightsAndBiases",
]
