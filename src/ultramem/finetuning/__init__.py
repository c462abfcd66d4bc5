"""Fine-tuning of models with memory layers."""

from ultramem.finetuning.config import FinetuneConfig
from ultramem.finetuning.run import FinetuneResult, finetune

__all__ = ["FinetuneConfig", "FinetuneResult", "finetune"]
