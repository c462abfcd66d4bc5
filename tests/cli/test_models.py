"""`ultramem import-olmo` and `import-flags`, as a user calls them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ultramem.cli import app, main
from ultramem.data.tokenizers import train_bpe
from ultramem.training import load_config

CHECKPOINTS = Path(__file__).parents[1] / "golden" / "olmo_checkpoints"


@pytest.mark.parametrize("name", ["memory_plus", "ultramem_v1", "ultramem_v2"])
def test_published_checkpoint_in_transformers(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["import-olmo", str(CHECKPOINTS / name), str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    arrays = np.load(CHECKPOINTS / name / "logits.npz")
    tokens, expected = (torch.from_numpy(arrays[key]) for key in ("input_ids", "logits"))
    with torch.no_grad():
        logits = model(tokens).logits
        assert (logits - expected).norm() < 1e-5 * expected.norm()
        step = model.generate(tokens[:, :5], max_new_tokens=1, do_sample=False)[:, -1]
    assert torch.equal(step, expected[:, 4].argmax(-1))


def test_with_a_tokenizer(tmp_path: Path) -> None:
    train_bpe([f"line {n} of text {m}: {n * m}" for n in range(60) for m in range(12)], 280).tokenizer.save(
        str(tmp_path / "tokenizer.json")
    )
    arguments = ["import-olmo", str(CHECKPOINTS / "ultramem_v2"), str(tmp_path / "model"), "--tokenizer"]
    vocabulary = torch.load(CHECKPOINTS / "ultramem_v2" / "model.pt", weights_only=True)["transformer.wte.weight"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "tokenizer.json")])
    if len(vocabulary) < 280:
        assert "has 280 tokens, but the model" in str(result.exception)
        assert not (tmp_path / "model").exists()
    else:
        assert result.exit_code == 0, result.output
        assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id == 0


def test_nothing_is_written_for_a_wrong_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(CHECKPOINTS / "ultramem_v2", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.pt"
    state = torch.load(file, weights_only=True)
    name = "transformer.mem_blocks.0.keys"
    state[name] = state[name][:, :, 1:]
    torch.save(state, file)
    monkeypatch.setattr("sys.argv", ["ultramem", "import-olmo", str(tmp_path / "checkpoint"), str(tmp_path / "model")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert name in error
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_flags(tmp_path: Path) -> None:
    flags = (
        "--model.mem_type=ultramem_v2 --model.d_model=64 --model.n_layers=2 --model.n_heads=2 --model.mem_knum=16 "
        "--model.mem_kdim=16 --model.mem_vdim=16 --model.mem_pre_vdim=16 --model.mem_knn=4 --max_duration=10"
    )
    result = CliRunner().invoke(app, ["import-flags", flags])
    assert result.exit_code == 0, result.output
    path = tmp_path / "run.yaml"
    path.write_text(result.output)
    files = "{train_files: [a.npy], vocab_size: 100, eos_token_id: 0, dtype: uint16, sequence_length: 4096}"
    config = load_config(path, [f"--data={files}", "--model.vocab_size=128"])
    assert config.model.memory is not None
    assert (config.model.memory.num_keys, config.model.memory.top_k, config.trainer.steps) == (16, 4, 10)
