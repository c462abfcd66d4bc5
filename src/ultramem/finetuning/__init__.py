"""Fine-tuning of models with memory layers."""

from ultramem.finetuning.run import FinetuneConfig, FinetuneResult, finetune

__all__ = ["FinetuneConfig", "FinetuneResult", "finetune"]
