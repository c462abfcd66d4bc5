"""Named model configurations: those of the papers, and a family of small ones."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from ultramem.config import MemoryConfig
from ultramem.configuration.field_types import LONGEST_SHOWN, shown
from ultramem.errors import ConfigError
from ultramem.hosts.olmo_core.config import ModelConfig
from ultramem.hosts.olmo_core.moe import MoEConfig


def preset(name: str) -> ModelConfig:
    """The model configuration with a name.

    Raises:
        ConfigError: there is no preset with this name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name)[:LONGEST_SHOWN], PRESETS, 1, 0)
        raise ConfigError(f"preset={shown(name)}: unknown preset; did you mean {near[0]!r}? All: {', '.join(PRESETS)}")
    return PRESETS[name]


_DENSE = {
    # UltraMemV2 (arXiv:2508.18756), table 1 and appendix B: about 227 million active parameters.
    "227m": ModelConfig(d_model=768, num_blocks=20, num_heads=12, feed_forward_size=3072),
    # About 1 billion. The paper's feed-forward width of UltraMemV2 is not known; this one meets its active parameters.
    "1b": ModelConfig(d_model=2048, num_blocks=16, num_heads=16, feed_forward_size=8192, tie_embeddings=False),
    # Small ones: equal active parameters, and equal totals of the sparse systems as far as whole numbers allow.
    "medium": ModelConfig(d_model=512, num_blocks=8, num_heads=8, feed_forward_size=1536),
    # For a few minutes on a CPU. At this length of training values do best that start small, and pre-values do not pay
    # yet.
    "small": ModelConfig(d_model=64, num_blocks=4, num_heads=2, feed_forward_size=192, vocab_size=4096),
}

_INIT = {"227m": "matched", "1b": "matched", "medium": "published", "small": "published"}
_TOP_K = {"227m": 80, "medium": 32, "small": 16}  # for each of two heads, of the memories but UltraMemV2's


def _memory(size: str, feed_forward_size: int, kind: str, num_keys: int, **fields: Any) -> ModelConfig:
    reads = {"top_k": 32, "share_ratio": 0.5} if kind == "ultramem_v2" else {"heads": 2, "top_k": _TOP_K[size]}
    memory = MemoryConfig(kind, num_keys, **{"init": _INIT[size], **reads, **fields})
    return replace(_DENSE[size], feed_forward_size=feed_forward_size, memory=memory)


def _experts(size: str, **moe: Any) -> ModelConfig:
    return replace(_DENSE[size], feed_forward_size=0, moe=MoEConfig(**moe))


PRESETS: dict[str, ModelConfig] = {
    "dense_227m": _DENSE["227m"],
    "olmoe_227m": _experts("227m", num_experts=64, top_k=8, hidden_size=384),
    "memory_plus_227m": _memory(
        "227m", 3008, "memory_plus", 1138, key_dim=384, value_dim=768, insertion="4:4/8:8/12:12/16:16"
    ),
    "ultramem_227m": _memory(
        "227m", 2752, "ultramem", 808, key_dim=192, value_dim=384, insertion="2:5/6:9/10:13/14:17"
    ),
    "ultramem_v2_227m": _memory("227m", 2496, "ultramem_v2", 360, key_dim=192, value_dim=192, pre_value_dim=192),
    "dense_1b": _DENSE["1b"],
    "olmoe_1b": _experts("1b", num_experts=64, top_k=8, hidden_size=1024),
    "ultramem_v2_1b": _memory("1b", 6656, "ultramem_v2", 528, key_dim=512, value_dim=768, pre_value_dim=384, top_k=128),
    "dense_medium": _DENSE["medium"],
    "olmoe_medium": _experts("medium", num_experts=64, top_k=8, hidden_size=192),
    "pkm_medium": _memory("medium", 1456, "pkm", 372, key_dim=128, value_dim=512, insertion="2:2/5:5"),
    "memory_plus_medium": _memory(
        "medium", 1184, "memory_plus", 528, key_dim=128, value_dim=512, insertion="1:1/3:3/5:5/7:7"
    ),
    "ultramem_medium": _memory(
        "medium", 1280, "ultramem", 430, key_dim=64, value_dim=256, insertion="1:2/3:4/5:6", value_lr_multiplier=8.0
    ),
    "ultramem_v2_medium": _memory(
        "medium", 1096, "ultramem_v2", 264, key_dim=128, value_dim=192, pre_value_dim=64, value_lr=1e-3
    ),
    "dense_small": _DENSE["small"],
    "olmoe_small": _experts("small", num_experts=144, top_k=9, hidden_size=16),
    "pkm_small": _memory("small", 160, "pkm", 112, key_dim=16, value_dim=64, insertion="1:1/3:3", init="matched"),
    "memory_plus_small": _memory(
        "small", 128, "memory_plus", 160, key_dim=16, value_dim=64, insertion="1:1/3:3", init="matched"
    ),
    "ultramem_small": _memory("small", 112, "ultramem", 158, key_dim=8, value_dim=32, insertion="0:1/2:3"),
    "ultramem_v2_small": _memory(
        "small",
        112,
        "ultramem_v2",
        80,
        key_dim=16,
        value_dim=64,
        axis_top_k=16,
        query_per_rank=False,
        optimizer="rowwise",
    ),
}
