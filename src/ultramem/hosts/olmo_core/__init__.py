"""The training host: OLMo-core transformers with memory layers, mixture of experts, or neither."""

from ultramem.hosts.olmo_core.config import ModelConfig
from ultramem.hosts.olmo_core.moe import MoEConfig
from ultramem.hosts.olmo_core.presets import PRESETS, preset
from ultramem.hosts.olmo_core.statistics import ModelStatistics, model_statistics

__all__ = ["PRESETS", "MoEConfig", "ModelConfig", "ModelStatistics", "model_statistics", "preset"]
