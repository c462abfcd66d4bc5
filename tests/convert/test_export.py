"""Training runs as transformers directories, and back."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from typer.testing import CliRunner

from ultramem import UltraMemError
from ultramem.cli import app
from ultramem.convert.export import export
from ultramem.convert.transformers_models import read_config, read_model, to_transformers_config
from ultramem.data.tokenizers import load_tokenizer
from ultramem.evaluation import SamplingConfig, TextGenerator, evaluate, find_checkpoint, load_model
from ultramem.hosts.olmo_core import ModelConfig, MoEConfig
from ultramem.hosts.transformers import UltraMemForCausalLM
from ultramem.training import load_config, train

SYSTEMS = ("dense", "ultramem_v2", "ultramem", "memory_plus", "pkm", "moe")
ARCHITECTURES = {"dense": "Qwen3ForCausalLM", "moe": "Qwen3MoeForCausalLM"}
systems = pytest.mark.parametrize("system", SYSTEMS)
TrainRun = Callable[[str], Path]


@systems
def test_logits_are_the_training_models(system: str, train_run: TrainRun, tmp_path: Path) -> None:
    run = train_run(system)
    result = export(run, tmp_path / "model")
    assert (result.step, result.has_tokenizer) == (4, True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == ARCHITECTURES.get(system, "UltraMemForCausalLM")
    trained, config = load_model(run, "cpu")
    tokens = torch.randint(config.model.vocab_size, (2, 32))
    with torch.no_grad():
        found, expected = model(tokens).logits, trained(tokens)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@systems
def test_state_comes_back_to_the_bit(system: str, train_run: TrainRun, tmp_path: Path) -> None:
    export(train_run(system), tmp_path / "model", max_shard_size="50KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    config, state = read_model(tmp_path / "model")
    trained, run = load_model(train_run(system), "cpu")
    expected = trained.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    for name in (
        "memory",
        "moe",
        "d_model",
        "num_blocks",
        "num_heads",
        "tie_embeddings",
        "rope_theta",
        "norm_eps",
        "system",
    ):
        assert getattr(config, name) == getattr(run.model, name)


@pytest.mark.parametrize("z_loss_coef", [0.0, 0.02])
def test_a_mixture_of_experts_comes_back_whole(z_loss_coef: float, tmp_path: Path) -> None:
    moe = MoEConfig(
        hidden_size=16, num_experts=4, top_k=2, load_balancing_coef=0.5, z_loss_coef=z_loss_coef, normalize_top_k=True
    )
    config = ModelConfig(d_model=32, num_blocks=2, num_heads=2, feed_forward_size=0, vocab_size=384, moe=moe)
    to_transformers_config(config).save_pretrained(tmp_path)
    assert read_config(tmp_path).moe == moe
    content = json.loads((tmp_path / "config.json").read_text())
    del content["router_z_loss_coef"]  # as transformers itself writes it
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_config(tmp_path).moe == replace(moe, z_loss_coef=MoEConfig.z_loss_coef)


@systems
def test_pretraining_goes_on_from_a_directory(
    system: str, train_run: TrainRun, run_yaml: Callable[..., Path], tmp_path: Path
) -> None:
    """The first loss of the new run is that of the exported model, not of a new one."""
    export(train_run(system), tmp_path / "model")
    config = load_config(run_yaml(tmp_path / "model"), ["--optimizer.learning_rate=1e-12"])
    assert config.model.system == system
    train(config)
    old, _ = load_model(train_run(system), "cpu")
    new, _ = load_model(config.trainer.directory, "cpu")
    for name, tensor in old.state_dict().items():
        if "table." in name:
            continue  # it has a learning rate of its own
        torch.testing.assert_close(new.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


def test_tables_in_bfloat16(train_run: TrainRun, run_yaml: Callable[..., Path], tmp_path: Path) -> None:
    """An export has one dtype; in float32 it computes what the run does, and a run that starts from it goes on."""
    run = train_run("ultramem_v2 with tables in bfloat16")
    export(run, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
    trained, config = load_model(run, "cpu")
    tokens = torch.randint(config.model.vocab_size, (2, 32))
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        found, expected = model(tokens).logits, trained(tokens)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert next(TextGenerator.from_checkpoint(run, "cpu").stream("line", SamplingConfig(max_new_tokens=3)))
    assert evaluate(run, device="cpu").loss < 7
    overrides = ["--optimizer.learning_rate=1e-12", "--model.memory.value_lr=1e-12"]
    continued = load_config(run_yaml(tmp_path / "model"), overrides)
    assert continued.model.memory is not None
    assert continued.model.memory.table_dtype == "bfloat16"
    train(continued)
    again, _ = load_model(continued.trainer.directory, "cpu")
    for name, tensor in trained.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


def test_tokenizer_is_the_runs(train_run: TrainRun, token_directory: Path, tmp_path: Path) -> None:
    export(train_run("ultramem_v2"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    reference = load_tokenizer(str(token_directory / "tokenizer.json"))
    text = "line 3 of text 4:  12\n\tödd"
    assert tokenizer(text).input_ids == reference.tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (reference.eos_token_id, reference.pad_token_id)
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 32


def test_generates_what_the_training_host_does(train_run: TrainRun, tmp_path: Path) -> None:
    run = train_run("ultramem_v2")
    export(run, tmp_path / "model")
    generator = TextGenerator.from_checkpoint(run, "cpu")
    generate = pipeline("text-generation", model=str(tmp_path / "model"), device="cpu")
    model, tokenizer = generate.model, generate.tokenizer
    prompts = ["line 1", "line 12 of text 3: 3"]
    expected = []
    for prompt in prompts:
        tokens = tokenizer(prompt).input_ids
        for _ in range(8):
            tokens.append(int(generator.next_logits(tokens).argmax()))
        expected.append(tokens)
    found = model.generate(**tokenizer(prompts[0], return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert found[0].tolist() == expected[0]
    texts = generate(prompts, max_new_tokens=8, do_sample=False, batch_size=2)
    assert [text[0]["generated_text"] for text in texts] == [tokenizer.decode(tokens) for tokens in expected]
    # Rows of the embedding beyond the tokenizer are never chosen.
    assert model.generation_config.suppress_tokens == list(range(280, 384))


def test_model_card_and_dtype(train_run: TrainRun, tmp_path: Path) -> None:
    run = train_run("ultramem_v2")
    evaluation = {"checkpoint": "step4", "loss": 5.25, "perplexity": 190.5, "bits_per_byte": 2.5}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    export(run, tmp_path / "model", dtype="bfloat16")
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"data": "data/other"}))
    export(run, tmp_path / "other")
    assert "held-out" not in (tmp_path / "other" / "README.md").read_text()
    (run / "evaluation.json").unlink()
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| held-out loss | 5.2500 |" in card
    assert "| training step | 4 of 4 |" in card
    assert "| training tokens | 512 |" in card
    code = card.partition("```python\n")[2].partition("```")[0].replace('"."', repr(str(tmp_path / "model")))
    exec(compile(code, "model card", "exec"), {})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(model, UltraMemForCausalLM)
    assert model.dtype == torch.bfloat16


def test_run_without_a_tokenizer(train_run: TrainRun, token_directory: Path, tmp_path: Path) -> None:
    """A run on files that are named one by one knows no tokenizer."""
    original = load_config(train_run("dense") / "config.yaml")
    files = sorted((token_directory / "train").glob("*.npy"))
    config = load_config(
        train_run("dense") / "config.yaml",
        [
            f"--trainer.directory={tmp_path / 'run'}",
            f"--data={{train_files: [{files[0]}], sequence_length: 32, vocab_size: 280, eos_token_id: 0, "
            "dtype: uint16}",
        ],
    )
    assert config.model == original.model
    train(config)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    assert "without a tokenizer" in result.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.eos_token_id is None


def test_an_export_is_replaced_only_when_asked(train_run: TrainRun, tmp_path: Path) -> None:
    run, directory = train_run("dense"), tmp_path / "model"
    export(run, directory)
    (directory / "README.md").write_text("changed")
    with pytest.raises(UltraMemError, match="exists already; replace it with --overwrite"):
        export(run, directory)
    with pytest.raises(UltraMemError, match="max_shard_size='large': must be a number of bytes"):
        export(run, directory, max_shard_size="large", overwrite=True)
    assert (directory / "README.md").read_text() == "changed"
    export(run, directory, overwrite=True)
    assert (directory / "README.md").read_text() != "changed"
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(UltraMemError, match=r"is not empty and has no config\.json"):
        export(run, other, overwrite=True)


@pytest.mark.parametrize(
    ("dtype", "run", "message"),
    [("int8", True, "dtype=int8: must be one of"), ("float32", False, "neither a run directory")],
)
def test_errors(dtype: str, run: bool, message: str, train_run: TrainRun, tmp_path: Path) -> None:
    with pytest.raises(UltraMemError, match=message):
        export(train_run("dense") if run else tmp_path, tmp_path / "model", dtype=dtype)
    assert not (tmp_path / "model").exists()


def test_initial_weights_that_do_not_fit(train_run: TrainRun, run_yaml: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UltraMemError, match=r"has no config\.json"):
        load_config(run_yaml(tmp_path))
    export(train_run("ultramem_v2"), tmp_path / "model")
    dense = find_checkpoint(train_run("dense")).config
    config = load_config(run_yaml(tmp_path / "model"), ["--model={preset: dense_small, vocab_size: 384}"])
    assert config.model != dense.model
    with pytest.raises(UltraMemError, match=r"initial_weights=.*: .* there, .* in this run's model; leave the model"):
        train(config)
    weights = next((tmp_path / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "model" / "checksums.json").unlink()  # as of version 0.1
    with pytest.raises(UltraMemError, match="cannot be loaded"):
        read_model(tmp_path / "model")
    other = tmp_path / "gpt2"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(
        UltraMemError, match="model_type=gpt2: must be ultramem, qwen3 or qwen3_moe, which the training"
    ):
        read_model(other)


def test_weights_that_are_not_complete(train_run: TrainRun, tmp_path: Path) -> None:
    export(train_run("dense"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.gate_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "model" / "checksums.json").unlink()
    with pytest.raises(UltraMemError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight is missing"):
        read_model(tmp_path / "model")


def test_what_else_is_in_a_directory_is_not_lost(train_run: TrainRun, tmp_path: Path) -> None:
    run, model = train_run("dense"), tmp_path / "model"
    export(run, model)
    for name in ("thesis.tex", "notes.json", "memory/thesis.tex"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).touch()
        with pytest.raises(UltraMemError, match=rf"also holds {name.split('/')[0]}.*, which would be lost"):
            export(run, model, overwrite=True)
        (model / name).unlink()
    (model / "memory").rmdir()


def test_checksums(train_run: TrainRun, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    export(train_run("ultramem_v2"), directory)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    checksums = json.loads(files.pop("checksums.json"))["files"]
    assert checksums == {name: [[len(text), f"{zlib.crc32(text):08x}"]] for name, text in files.items()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "modeling_ultramem.py"} <= files.keys()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("system", ["dense", "ultramem_v2"])
def test_damaged_initial_weights(
    system: str, name: str, train_run: TrainRun, run_yaml: Callable[..., Path], tmp_path: Path
) -> None:
    export(train_run(system), tmp_path / "model")
    config = run_yaml(tmp_path / "model")
    content = bytearray((tmp_path / "model" / name).read_bytes())
    content[-3] ^= 16
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(UltraMemError, match=rf"{name} is damaged: it differs from its checksum; write it again"):
        train(load_config(config))


@pytest.mark.parametrize("system", ["dense", "ultramem_v2"])
def test_a_model_of_someone_else_is_not_replaced(system: str, train_run: TrainRun, tmp_path: Path) -> None:
    run, model = train_run(system), tmp_path / "model"
    export(run, model)
    (model / "checksums.json").unlink(missing_ok=True)  # as version 0.1 wrote it
    export(run, model, overwrite=True)
    for sign in ("README.md", "modeling_ultramem.py", "checksums.json"):
        (model / sign).unlink(missing_ok=True)
    written = (model / "model.safetensors").read_bytes()
    with pytest.raises(UltraMemError, match=r"model has a config\.json that ultramem did not write; choose another"):
        export(run, model, overwrite=True)
    assert (model / "model.safetensors").read_bytes() == written


def test_a_full_disk_is_one_clear_line(train_run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    run = train_run("dense")
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(
        UltraMemError, match=r"model cannot be written \(.*No space left .*\) and the partial output was"
    ):
        export(run, tmp_path / "model")
    assert not list(tmp_path.glob("model*"))
