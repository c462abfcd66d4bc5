"""Named model configurations: those of the papers, and a family of small ones."""

from __future__ import annotations

import difflib
from dataclasses import replace

from ultramem.config import MemoryConfig
from ultramem.errors import ConfigError
from ultramem.hosts.olmo_core.config import ModelConfig
from ultramem.hosts.olmo_core.moe import MoEConfig


def preset(name: str) -> ModelConfig:
    """The model configuration with a name.

    Raises:
        ConfigError: there is no preset with this name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1, 0)
        raise ConfigError(f"preset={name!r}: unknown preset; did you mean {near[0]!r}? All: {', '.join(PRESETS)}")
    return PRESETS[name]


# UltraMemV2 (arXiv:2508.18756), table 1 and appendix B: about 227 million active parameters.
_DENSE_227M = ModelConfig(d_model=768, num_blocks=20, num_heads=12, feed_forward_size=3072)
# About 1 billion. The paper's feed-forward width of UltraMemV2 is not known; this one meets its active parameters.
_DENSE_1B = ModelConfig(d_model=2048, num_blocks=16, num_heads=16, feed_forward_size=8192, tie_embeddings=False)
# Small ones: equal active parameters, and equal totals of the sparse systems as far as whole numbers allow.
_DENSE_MEDIUM = ModelConfig(d_model=512, num_blocks=8, num_heads=8, feed_forward_size=1536)
# For a few minutes on a CPU. At this length of training values do best that start small and learn no faster than the
# rest, and pre-values do not pay yet.
_DENSE_SMALL = ModelConfig(d_model=64, num_blocks=4, num_heads=2, feed_forward_size=192, vocab_size=4096)

PRESETS: dict[str, ModelConfig] = {
    "dense_227m": _DENSE_227M,
    "olmoe_227m": replace(_DENSE_227M, feed_forward_size=0, moe=MoEConfig(num_experts=64, top_k=8, hidden_size=384)),
    "memory_plus_227m": replace(
        _DENSE_227M,
        feed_forward_size=3008,
        memory=MemoryConfig(
            kind="memory_plus",
            num_keys=1138,
            key_dim=384,
            value_dim=768,
            heads=2,
            top_k=80,
            insertion="4:4/8:8/12:12/16:16",
        ),
    ),
    "ultramem_227m": replace(
        _DENSE_227M,
        feed_forward_size=2752,
        memory=MemoryConfig(
            kind="ultramem",
            num_keys=808,
            key_dim=192,
            value_dim=384,
            heads=2,
            top_k=80,
            insertion="2:5/6:9/10:13/14:17",
        ),
    ),
    "ultramem_v2_227m": replace(
        _DENSE_227M,
        feed_forward_size=2496,
        memory=MemoryConfig(num_keys=360, key_dim=192, value_dim=192, pre_value_dim=192, top_k=32, share_ratio=0.5),
    ),
    "dense_1b": _DENSE_1B,
    "olmoe_1b": replace(_DENSE_1B, feed_forward_size=0, moe=MoEConfig(num_experts=64, top_k=8, hidden_size=1024)),
    "ultramem_v2_1b": replace(
        _DENSE_1B,
        feed_forward_size=6656,
        memory=MemoryConfig(num_keys=528, key_dim=512, value_dim=768, pre_value_dim=384, top_k=128, share_ratio=0.5),
    ),
    "dense_medium": _DENSE_MEDIUM,
    "olmoe_medium": replace(
        _DENSE_MEDIUM, feed_forward_size=0, moe=MoEConfig(num_experts=64, top_k=8, hidden_size=192)
    ),
    "pkm_medium": replace(
        _DENSE_MEDIUM,
        feed_forward_size=1456,
        memory=MemoryConfig(
            kind="pkm",
            num_keys=372,
            key_dim=128,
            value_dim=512,
            heads=2,
            top_k=32,
            insertion="2:2/5:5",
            init="published",
        ),
    ),
    "memory_plus_medium": replace(
        _DENSE_MEDIUM,
        feed_forward_size=1184,
        memory=MemoryConfig(
            kind="memory_plus",
            num_keys=528,
            key_dim=128,
            value_dim=512,
            heads=2,
            top_k=32,
            insertion="1:1/3:3/5:5/7:7",
            init="published",
        ),
    ),
    "ultramem_medium": replace(
        _DENSE_MEDIUM,
        feed_forward_size=1280,
        memory=MemoryConfig(
            kind="ultramem",
            num_keys=430,
            key_dim=64,
            value_dim=256,
            heads=2,
            top_k=32,
            insertion="1:2/3:4/5:6",
            init="published",
            value_lr_multiplier=8.0,
        ),
    ),
    "ultramem_v2_medium": replace(
        _DENSE_MEDIUM,
        feed_forward_size=1096,
        memory=MemoryConfig(
            num_keys=264,
            key_dim=128,
            value_dim=192,
            pre_value_dim=64,
            top_k=32,
            share_ratio=0.5,
            init="published",
            value_lr=1e-3,
        ),
    ),
    "dense_small": _DENSE_SMALL,
    "olmoe_small": replace(_DENSE_SMALL, feed_forward_size=0, moe=MoEConfig(num_experts=144, top_k=9, hidden_size=16)),
    "pkm_small": replace(
        _DENSE_SMALL,
        feed_forward_size=160,
        memory=MemoryConfig(kind="pkm", num_keys=112, key_dim=16, value_dim=64, heads=2, top_k=16, insertion="1:1/3:3"),
    ),
    "memory_plus_small": replace(
        _DENSE_SMALL,
        feed_forward_size=128,
        memory=MemoryConfig(
            kind="memory_plus", num_keys=160, key_dim=16, value_dim=64, heads=2, top_k=16, insertion="1:1/3:3"
        ),
    ),
    "ultramem_small": replace(
        _DENSE_SMALL,
        feed_forward_size=112,
        memory=MemoryConfig(
            kind="ultramem",
            num_keys=158,
            key_dim=8,
            value_dim=32,
            heads=2,
            top_k=16,
            insertion="0:1/2:3",
            init="published",
        ),
    ),
    "ultramem_v2_small": replace(
        _DENSE_SMALL,
        feed_forward_size=112,
        memory=MemoryConfig(
            num_keys=80,
            key_dim=16,
            value_dim=64,
            top_k=32,
            axis_top_k=16,
            share_ratio=0.5,
            query_per_rank=False,
            init="published",
            value_lr_multiplier=1.0,
        ),
    ),
}
