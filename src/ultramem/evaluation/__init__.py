"""What a checkpoint has learnt: its loss on token files, and text that it writes."""

from ultramem.evaluation.checkpoints import Checkpoint, find_checkpoint, load_model
from ultramem.evaluation.generation import (
    Sample,
    SamplingConfig,
    TextGenerator,
    print_samples,
    read_prompt,
    save_samples,
)
from ultramem.evaluation.loss import Evaluation, evaluate
from ultramem.evaluation.sampling import sample

__all__ = [
    "Checkpoint",
    "Evaluation",
    "Sample",
    "SamplingConfig",
    "TextGenerator",
    "evaluate",
    "find_checkpoint",
    "load_model",
    "print_samples",
    "read_prompt",
    "sample",
    "save_samples",
]
