"""Models are taught new documents, and nothing else in them changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from tiny_finetuning import MEMORY, NEW, SIZES
from ultramem.cli import app
from ultramem.config import MemoryConfig
from ultramem.errors import ConfigError, UltraMemError
from ultramem.finetuning import FinetuneConfig, finetune
from ultramem.finetuning.examples import make_examples, mean_loss
from ultramem.hosts.transformers import attach_memory, load_memory, save_memory
from ultramem.hosts.transformers.files import save_checksums


def config(files: dict[str, Path], **options: Any) -> FinetuneConfig:
    defaults: dict[str, Any] = {
        "model": files["model"], "data": (files["new"],), "output": files["output"], "rows": 20, "steps": 20,
        "background": (files["background"],), "heldout": (files["heldout"],), "batch_size": 3, "sequence_length": 16,
        "device": "cpu",
    }  # fmt: skip
    return FinetuneConfig(**{**defaults, **options})


def changed(before: Path, after: Path) -> dict[str, torch.Tensor]:
    """For each tensor of the model, which elements differ."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys()
    return {name: new[name] != old[name] for name in old}


def test_sparse_changes_few_rows_and_nothing_else(files: dict[str, Path]) -> None:
    result = finetune(config(files, optimizer="sgd", learning_rate=10.0))
    differences = changed(files["model"], files["output"])
    table = differences.pop("model.memory.table.values")
    assert not any(difference.any() for difference in differences.values())
    assert 0 < table.any(1).sum() <= result.trained_rows < result.table_rows == 288
    assert result.trained_parameters == result.trained_rows * 8
    assert result.after.new < result.before.new
    written = json.loads((files["output"] / "finetuning.json").read_text())
    assert written["after"] == {"new": result.after.new, "heldout": result.after.heldout}
    assert written["settings"]["learning_rate"] == 10.0
    assert [path.name for path in files["output"].parent.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_methods(files: dict[str, Path], method: str) -> None:
    result = finetune(config(files, method=method, background=(), steps=None, epochs=10, learning_rate=1e-2))
    assert result.steps == 10 * -(-result_examples(files) // 3)
    assert result.after.new < result.before.new - 0.1
    differences = changed(files["model"], files["output"])
    assert differences["model.layers.0.self_attn.q_proj.weight"].any()
    assert differences["model.memory.table.values"].any() == (method == "full")
    assert (result.trained_rows, result.trained_parameters < result.parameters) == (
        (288, False) if method == "full" else (0, True)
    )


def result_examples(files: dict[str, Path]) -> int:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(files["model"])
    return len(make_examples(NEW, tokenizer, 16))


def test_memory_that_was_attached(files: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    attach_memory(model, MemoryConfig(**MEMORY))
    save_memory(model, tmp_path / "memory")
    result = finetune(config(files, model=base, memory=tmp_path / "memory"))
    assert not any(difference.any() for difference in changed(base, files["output"]).values())
    tuned = AutoModelForCausalLM.from_pretrained(files["output"])
    load_memory(tuned, files["output"] / "memory")
    examples = make_examples(NEW, tokenizer, 16)
    assert mean_loss(tuned.eval(), examples, 3) == pytest.approx(result.after.new, rel=1e-5)


def test_command(files: dict[str, Path]) -> None:
    arguments = ["finetune", "model", "new", "--background", "background", "--heldout", "heldout", "--output", "output"]
    options = ["--steps", "2", "--rows", "5", "--batch-size", "4", "--device", "cpu"]
    result = CliRunner().invoke(app, [*(str(files.get(name, name)) for name in arguments), *options])
    assert result.exit_code == 0, result.output
    assert "held-out data" in result.output
    assert (files["output"] / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dora"}, "method='dora': must be one of sparse, full, lora"),
        ({"optimizer": "adam"}, "optimizer='adam': must be one of sgd, adamw"),
        ({"rows": 0}, "rows=0"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0"),
        ({"epochs": 2}, "steps=20: must not be given with epochs=2"),
        ({"background": ()}, "method=sparse: needs a background"),
        ({"method": "full"}, r"^background=.*background\.txt: method=full does not use it; leave it out"),
        ({"method": "lora"}, r"^background=.*background\.txt: method=lora does not use it"),
        ({"data": (Path("missing.txt"),)}, r"missing\.txt does not exist"),
        ({"model": Path("missing")}, r"missing has no config\.json"),
        ({"device": "tpu"}, "device=tpu"),
    ],
)
def test_mistakes(files: dict[str, Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UltraMemError, match=message) as error:
        finetune(config(files, **options))
    assert "\n" not in str(error.value)
    assert not files["output"].exists()


def test_output_that_is_there_stays(files: dict[str, Path]) -> None:
    files["output"].mkdir()
    (files["output"] / "notes.txt").write_text("mine")
    with pytest.raises(UltraMemError, match="output"):
        finetune(config(files))
    assert (files["output"] / "notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError):
        config(files, sequence_length=0)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_damaged_model(files: dict[str, Path], name: str) -> None:
    save_checksums(files["model"])
    content = bytearray((files["model"] / name).read_bytes())
    content[-3] ^= 16
    (files["model"] / name).write_bytes(content)
    with pytest.raises(UltraMemError, match=rf"{name} is damaged: it differs from its checksum; write it again"):
        finetune(config(files))


def test_checksums(files: dict[str, Path]) -> None:
    finetune(config(files, steps=1))
    names = {path.name for path in files["output"].iterdir()}
    listed = json.loads((files["output"] / "checksums.json").read_text())["files"].keys()
    assert listed == names - {"checksums.json"}
    assert {"finetuning.json", "model.safetensors", "tokenizer.json"} <= listed
    finetune(config(files, steps=1, model=files["output"], output=files["output"].with_name("again")))


@pytest.mark.parametrize(
    ("method", "option", "right"),
    [("full", "--rows", "sparse"), ("lora", "--background-batches", "sparse"), ("sparse", "--rank", "lora")],
)
def test_options_of_another_method(files: dict[str, Path], method: str, option: str, right: str) -> None:
    arguments = ["finetune", str(files["model"]), str(files["new"]), "--output", str(files["output"])]
    result = CliRunner().invoke(app, [*arguments, "--method", method, option, "5"])
    assert str(result.exception) == f"{option}: does not apply here; it is for --method {right}"


def test_patterns_without_a_directory(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"include=\*.py: applies to directories, and none is given; leave it out"):
        finetune(config(files, include=("*.py",)))
