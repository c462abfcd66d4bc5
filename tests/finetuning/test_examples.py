"""Documents as examples, and the loss on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tiny_finetuning import NEW
from ultramem.errors import UltraMemError
from ultramem.finetuning.examples import background_batches, collate, make_examples, mean_loss, read_texts


def test_examples_are_pieces_of_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = make_examples(NEW[:2], tokenizer, 8)
    whole = [tokenizer(text)["input_ids"] + [0] for text in NEW[:2]]
    assert [token for piece in pieces for token in piece["input_ids"]] == whole[0] + whole[1]
    assert max(len(piece["input_ids"]) for piece in pieces) == 8
    batch = collate([{"input_ids": [5, 6, 0]}, {"input_ids": [0]}])
    assert batch["labels"].tolist() == [[5, 6, 0], [0, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_background_batches_are_different_sequences() -> None:
    examples = [{"input_ids": [*range(30)]}, {"input_ids": [*range(30, 53)]}]
    options: dict[str, Any] = {"sequence_length": 8, "seed": 0, "device": torch.device("cpu")}
    batches = [*background_batches(examples, batch_tokens=12, batches=9, **options)]
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 6)] * 4
    tokens = torch.cat([batch["input_ids"] for batch in batches]).flatten()
    assert tokens.sort().values.tolist() == [*range(48)]
    assert len([*background_batches(examples, batch_tokens=12, batches=3, **options)]) == 3
    with pytest.raises(UltraMemError, match="53 tokens"):
        next(background_batches(examples, batch_tokens=60, batches=3, **options))


def test_mean_loss_weighs_all_tokens_alike(files: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(files["model"])
    examples = make_examples(NEW, tokenizer, 64)
    losses = []
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        losses.append(F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    assert mean_loss(model, examples, 3) == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_source_trees(tmp_path: Path) -> None:
    """Files of the given patterns; empty ones are passed over."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "module.py").write_text("x = 1")
    (tmp_path / "package" / "notes.txt").write_text("notes")
    assert read_texts([tmp_path], include=["*.py"]) == ["x = 1"]
    with pytest.raises(UltraMemError, match=r"no document in .*; give other files"):
        read_texts([tmp_path], include=["__init__.py"])
