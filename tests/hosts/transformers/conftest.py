"""Tiny models of transformers with memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ultramem.hosts.transformers import UltraMemConfig, UltraMemForCausalLM

VOCABULARY = 61
MEMORIES = {
    "ultramem_v2": {"num_keys": 6, "key_dim": 8, "value_dim": 8, "pre_value_dim": 8, "top_k": 4, "share_ratio": 0.5},
    "ultramem": {
        "kind": "ultramem", "num_keys": 6, "key_dim": 8, "value_dim": 8, "top_k": 3, "heads": 2, "insertion": "0:2/1:1",
    },
    "memory_plus": {"kind": "memory_plus", "num_keys": 6, "key_dim": 8, "value_dim": 16, "top_k": 4},
    "pkm": {"kind": "pkm", "num_keys": 6, "key_dim": 8, "value_dim": 32, "top_k": 4, "heads": 2, "insertion": "1:1"},
}  # fmt: skip


@pytest.fixture
def make_model() -> Callable[..., UltraMemForCausalLM]:
    """Makes a model of a kind of memory, in evaluation mode; options as of `UltraMemConfig` and of its memory."""

    def make(
        kind: str = "ultramem_v2", memory: dict[str, object] | None = None, **options: object
    ) -> UltraMemForCausalLM:
        torch.manual_seed(0)
        fields: dict[str, object] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "initializer_range": 0.2,
            "max_position_embeddings": 64,
            "eos_token_id": 0,
            "pad_token_id": 1,
        }
        return UltraMemForCausalLM(UltraMemConfig(memory=MEMORIES[kind] | (memory or {}), **(fields | options))).eval()

    return make


@pytest.fixture
def tokens() -> Tensor:
    """Token ids (3, 12), without special ones."""
    return torch.randint(2, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
