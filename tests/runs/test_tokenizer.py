"""The tokenizer of a run, and which token ends a text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from ultramem.errors import UltraMemError
from ultramem.runs.checkpoints import find_checkpoint
from ultramem.runs.tokenizer import find_tokenizer


def eos_token_id(run: Any) -> int:
    return find_tokenizer(find_checkpoint(run.path)).eos_token_id


def change_data(run: Any, eos: int) -> None:
    """Make another token the end of the data's texts."""
    manifest = run.data / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"eos_token_id": 0', f'"eos_token_id": {eos}'))


def add_tokens(run: Any, *tokens: str) -> None:
    """To the tokenizer in the run directory."""
    tokenizer = Tokenizer.from_file(str(run.path / "tokenizer.json"))
    tokenizer.add_special_tokens([*tokens])
    tokenizer.save(str(run.path / "tokenizer.json"))


def test_the_tokenizer_is_in_the_run(run: Any) -> None:
    run.data.rename(run.data.with_name("elsewhere"))
    assert find_tokenizer(find_checkpoint(run.path)).eos_token_id == 0
    (run.path / "tokenizer.json").unlink()
    with pytest.raises(UltraMemError, match=r"run/tokenizer.json does not exist; copy"):
        find_tokenizer(find_checkpoint(run.path))


def test_a_tokenizer_that_is_too_large(run: Any) -> None:
    tokenizer = Tokenizer.from_file(str(run.path / "tokenizer.json"))
    tokenizer.add_tokens([f"word{i}" for i in range(200)])
    tokenizer.save(str(run.path / "tokenizer.json"))
    with pytest.raises(UltraMemError, match="has 458 tokens, but the model was trained with 384"):
        find_tokenizer(find_checkpoint(run.path))


def test_the_record_of_the_run_comes_first(run: Any) -> None:
    (run.path / "summary.json").write_text(json.dumps({"eos_token_id": 5}))
    assert eos_token_id(run) == 5
    change_data(run, 7)  # other data at the same place
    assert eos_token_id(run) == 5
    run.data.rename(run.data.with_name("elsewhere"))
    assert eos_token_id(run) == 5


def test_without_a_record_the_data_says_it(run: Any) -> None:
    change_data(run, 7)
    assert eos_token_id(run) == 7
    for content in ("[", "[]", "{}", '{"eos_token_id": null}'):
        (run.path / "summary.json").write_text(content)
        assert eos_token_id(run) == 7


def test_token_files_say_it_in_the_configuration(run: Any) -> None:
    described = "train_files: [a.npy]\n  vocab_size: 258\n  eos_token_id: 9\n  dtype: uint16"
    run.change_config(f"directory: {run.data}", described)
    assert eos_token_id(run) == 9


def test_no_guess_where_nothing_says_it(run: Any) -> None:
    run.data.rename(run.data.with_name("elsewhere"))
    add_tokens(run, "</s>")
    found = r"it could be <\|endoftext\|> or </s>"
    message = rf"tokenizer\.json does not define an end-of-text token \({found}\), .* restore the data"
    with pytest.raises(UltraMemError, match=message):
        eos_token_id(run)
    (run.path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert eos_token_id(run) == 258
    (run.path / "tokenizer_config.json").unlink()
    text = (run.path / "tokenizer.json").read_text()
    (run.path / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<end>").replace("</s>", "<other>"))
    with pytest.raises(UltraMemError, match=r"\(its vocabulary has no common one\), .*\"eos_token_id\" to summary"):
        eos_token_id(run)
