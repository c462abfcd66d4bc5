"""Callbacks of OLMo-core's trainer: what a run does besides training, one subject per file."""

from ultramem.training.callbacks.checkpoints import Checkpoints
from ultramem.training.callbacks.evaluation import HeldoutCallback, TaskCallback
from ultramem.training.callbacks.external_metrics import TensorBoard, WeightsAndBiases
from ultramem.training.callbacks.layer_metrics import LayerMetrics
from ultramem.training.callbacks.metrics_file import MetricsFile
from ultramem.training.callbacks.progress import ProgressReport
from ultramem.training.callbacks.step_seed import StepSeed
from ultramem.training.callbacks.stopping import DivergedError, StopOnSignal, StopWhenDiverged

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
