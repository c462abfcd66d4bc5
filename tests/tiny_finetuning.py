"""A tiny model with memory, its tokenizer, and documents to teach it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ultramem.data.tokenizers import train_bpe
from ultramem.hosts.transformers import UltraMemConfig, UltraMemForCausalLM

MEMORY: dict[str, Any] = {"num_keys": 12, "key_dim": 8, "value_dim": 8, "top_k": 4, "share_ratio": 0.5}
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
NEW = [f"capital_of['{name}'] = '{name[::-1]}'" for name in ("zorvex", "miluna", "tarok", "bespin")]
OLD = [f"def function_{number}(x):\n    return x + {number}\n" for number in range(40)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(NEW + OLD, 300).tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>"
    )


@pytest.fixture
def files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    torch.manual_seed(0)
    UltraMemForCausalLM(UltraMemConfig(**SIZES, memory=MEMORY)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in NEW))
    for name, texts in (("background", OLD[:30]), ("heldout", OLD[30:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    names = ("model", "new.jsonl", "background.txt", "heldout.txt", "output")
    return {name.partition(".")[0]: tmp_path / name for name in names}
