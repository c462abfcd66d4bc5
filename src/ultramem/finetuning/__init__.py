"""Fine-tuning of models with memory layers."""

from ultramem.finetuning.finetune import FinetuneConfig, FinetuneResult, finetune

__all__ = ["FinetuneConfig", "FinetuneResult", "finetune"]
