"""Damage to a model's directory is found before it is read, also by a user's own code; nothing in it is executed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ultramem import UltraMemError
from ultramem.hosts.transformers import UltraMemForCausalLM, UltraMemModel
from ultramem.hosts.transformers.files import check_model_files, load_config_file, load_model_file, save_checksums

Make = Callable[..., UltraMemForCausalLM]
LOADERS: list[Callable[..., Any]] = [
    AutoModelForCausalLM.from_pretrained,
    AutoModel.from_pretrained,
    UltraMemForCausalLM.from_pretrained,
    UltraMemModel.from_pretrained,
    lambda directory: load_model_file(directory, torch.float32),
]


@pytest.fixture
def directory(make_model: Make, tmp_path: Path) -> Path:
    """A model in two files, with checksums, as commands write it."""
    make_model().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    save_checksums(tmp_path / "model")
    return tmp_path / "model"


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("load", LOADERS)
def test_damage_is_found(load: Callable[..., Any], directory: Path) -> None:
    load(directory)
    names = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    for path in (*(directory / name for name in names), *directory.glob("*.safetensors")):
        place = path.read_bytes().index(b"hidden_size") if path.name == "config.json" else -1
        flip(path, place)
        with pytest.raises(
            UltraMemError, match=rf"{path.name} is damaged: it differs from its checksum; write it again"
        ):
            load(directory)
        flip(path, place)
    load(directory)


def test_checked_in_a_subfolder_too(directory: Path) -> None:
    flip(directory / "config.json")
    with pytest.raises(UltraMemError, match="is damaged"):
        UltraMemForCausalLM.from_pretrained(directory.parent, subfolder="model")


def test_a_directory_without_checksums(directory: Path, make_model: Make) -> None:
    flip(next(directory.glob("*.safetensors")))
    (directory / "checksums.json").unlink()  # as of version 0.1, or as transformers saves
    UltraMemForCausalLM.from_pretrained(directory)
    model = make_model()
    assert UltraMemForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())


@pytest.mark.parametrize("what", ["model", "decoder", "config"])
def test_saved_again_in_place(what: str, directory: Path, make_model: Make, tokens: Tensor) -> None:
    """Checksums that no longer fit are removed."""
    other = make_model(initializer_range=0.1)
    {"model": other, "decoder": other.model, "config": other.config}[what].save_pretrained(directory)
    assert not (directory / "checksums.json").exists()
    if what == "model":
        assert torch.equal(AutoModelForCausalLM.from_pretrained(directory)(tokens).logits, other(tokens).logits)


def test_files_that_a_user_adds_are_not_checked(directory: Path) -> None:
    for name in ("adapter_model.safetensors", "vocab.json", "tokenizer_config.json"):
        (directory / name).write_text("{}")
    (directory / "README.md").write_text("mine")
    check_model_files(directory)
    AutoModelForCausalLM.from_pretrained(directory)


def test_a_dense_model(tmp_path: Path) -> None:
    """By our own commands; its class is that of transformers, which does not know of checksums."""
    config = Qwen3Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, head_dim=8)  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    save_checksums(tmp_path)
    load_model_file(tmp_path, torch.float32)
    flip(tmp_path / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UltraMemError, match=r"model.safetensors is damaged: .*; if it was changed on purpose, remove"):
        load_model_file(tmp_path, torch.float32)


@pytest.mark.parametrize("load", LOADERS)
def test_indices_that_are_none(load: Callable[..., Any], make_model: Make, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.memory.layers.1.shuffle"
    tensors[name][3] = 10**9
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UltraMemError, match=r"layers\.1\.shuffle is damaged: it must be a permutation"):
        load(tmp_path)


@pytest.mark.parametrize("model_type", ["ultramem", "qwen3", "evil"])
def test_code_in_a_directory_is_not_run(
    model_type: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does anything ask whether to."""
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asks"))
    content = json.loads((directory / "config.json").read_text())
    code = {f"Auto{name}": f"evil.{name}" for name in ("Config", "Model", "ModelForCausalLM", "Tokenizer")}
    (directory / "config.json").write_text(json.dumps(content | {"model_type": model_type, "auto_map": code}))
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (directory / "modeling_ultramem.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (directory / "checksums.json").unlink()
    for load in (load_config_file, lambda path: load_model_file(path, torch.float32)):
        with contextlib.nullcontext() if model_type == "ultramem" else contextlib.suppress(UltraMemError):
            load(directory)
    assert not (tmp_path / "ran").exists()
