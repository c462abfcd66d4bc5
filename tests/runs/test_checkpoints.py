"""Finding and loading checkpoints, and what is said when that is not possible."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from olmo_core.train import Checkpointer

from ultramem.errors import ConfigError, UltraMemError
from ultramem.hosts.olmo_core.checkpoint import write_checksums
from ultramem.runs.checkpoints import complete_steps, find_checkpoint, load_model


def test_everything_comes_from_the_checkpoint(run: Any) -> None:
    model, config = load_model(run.path, "cpu")
    state, expected = model.state_dict(), run.model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    assert model.lm_head.w_out.weight is model.embeddings.weight
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert config.data.sequence_length == 16
    tokens = torch.arange(32).view(2, 16)
    assert torch.equal(model(tokens), run.model(tokens))


def test_nothing_is_initialised_at_random(run: Any) -> None:
    state = torch.get_rng_state()
    load_model(run.path, "cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_untied_embeddings(run: Any) -> None:
    run.change_config("  vocab_size: 384\n", "  vocab_size: 384\n  tie_embeddings: false\n")
    expected = find_checkpoint(run.path).config.model.build()
    expected.init_weights()
    run.save_checkpoint(8, expected)
    model, _ = load_model(run.path, "cpu")
    assert torch.equal(model.lm_head.w_out.weight, expected.lm_head.w_out.weight)
    assert torch.equal(model.embeddings.weight, expected.embeddings.weight)


@pytest.mark.parametrize(
    "section",
    [
        "memory: null",
        "moe: {hidden_size: 16, num_experts: 4, top_k: 2}",
        "memory: {kind: pkm, num_keys: 8, key_dim: 8, value_dim: 32, top_k: 4}",
        "memory: {kind: memory_plus, num_keys: 8, key_dim: 8, value_dim: 8, top_k: 4}",
        "memory: {kind: ultramem, num_keys: 8, key_dim: 8, value_dim: 8, top_k: 4, insertion: '0:1'}",
    ],
)
def test_every_system(run: Any, section: str) -> None:
    run.change_config("memory: {num_keys: 8, key_dim: 8, value_dim: 8, pre_value_dim: 8, top_k: 4}", section)
    expected = find_checkpoint(run.path).config.model.build()
    expected.init_weights()
    run.save_checkpoint(8, expected)
    tokens = torch.arange(32).view(2, 16)
    assert torch.equal(load_model(run.path, "cpu")[0](tokens), expected.eval()(tokens))


def test_a_run_means_its_latest_complete_checkpoint(run: Any) -> None:
    run.save_checkpoint(12)
    run.save_checkpoint(101)
    (run.save_checkpoint(900) / ".metadata.json").unlink()
    assert find_checkpoint(run.path).name == "step101"
    assert find_checkpoint(run.path / "step12").name == "step12"


@pytest.mark.parametrize("lacks", [None, "train/rank0.pt", "model_and_optim/.metadata", ".metadata.json"])
def test_complete_is_what_the_trainer_takes_for_complete(run: Any, lacks: str | None) -> None:
    directory = run.save_checkpoint(12)
    (run.path / "step13-tmp").mkdir()
    (run.path / "step14").touch()
    if lacks is not None:
        (directory / lacks).unlink()
    assert complete_steps(run.path) == sorted(step for step, _ in Checkpointer.find_checkpoints(run.path))
    assert complete_steps(run.path) == ([7, 12] if lacks is None else [7])


def test_relative_paths(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.path)
    assert find_checkpoint("step7").run == run.path
    assert find_checkpoint(".").name == "step7"


def test_not_a_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UltraMemError, match=rf"{path} is neither a run directory.*ultramem train"):
            find_checkpoint(path)


def test_no_complete_checkpoint(run: Any) -> None:
    (run.path / "step7" / "model_and_optim" / ".metadata").unlink()
    with pytest.raises(UltraMemError, match="has no complete checkpoint yet"):
        find_checkpoint(run.path)


def test_other_steps_are_named(run: Any) -> None:
    run.save_checkpoint(12)
    (run.path / "step20").mkdir()
    with pytest.raises(UltraMemError, match=r"step20 is not a complete checkpoint; .* are step7, step12"):
        find_checkpoint(run.path / "step20")
    with pytest.raises(UltraMemError, match=r"step21 does not exist; .*step7, step12"):
        find_checkpoint(run.path / "step21")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("d_model: 32", "d_model: 64", r"embeddings.weight has the shape \(384, 32\), not \(384, 64\)"),
        ("num_blocks: 2", "num_blocks: 3", r"it lacks blocks\.2\."),
        ("num_blocks: 2", "num_blocks: 1", r"memory.table.values has the shape \(128, 8\), not \(64, 8\)"),
        ("  memory: {", "  #", r"it also has memory\.layers\.0\.cores"),
        ("num_keys: 8", "num_keys: 16", r"memory.table.values has the shape \(128, 8\), not \(512, 8\)"),
    ],
)
def test_checkpoint_of_another_configuration(run: Any, old: str, new: str, message: str) -> None:
    run.change_config(old, new)
    with pytest.raises(UltraMemError, match=f"step7/model_and_optim does not fit the run's configuration: .*{message}"):
        load_model(run.path)


@pytest.mark.parametrize("size", [0, 1000])
def test_damaged_weights(run: Any, size: int) -> None:
    for file in (run.path / "step7" / "model_and_optim").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:size])
    message = rf"step7/model_and_optim/\S+ is damaged: it has {size} bytes, .*; there is no good checkpoint before it$"
    with pytest.raises(UltraMemError, match=message):
        load_model(run.path)


def test_missing_weights(run: Any) -> None:
    next((run.path / "step7" / "model_and_optim").glob("*.distcp")).unlink()
    with pytest.raises(UltraMemError, match=r"distcp is missing; there is no good checkpoint before it$"):
        load_model(run.path)


def test_damaged_index(run: Any) -> None:
    (run.path / "step7" / "model_and_optim" / ".metadata").write_bytes(b"")
    with pytest.raises(UltraMemError, match=r"\.metadata is damaged \(Ran out of input\); there is no good checkpoint"):
        load_model(run.path)


def test_checksums(run: Any) -> None:
    """A flipped bit is noticed, and the latest checkpoint before it that is as it was written is named."""
    for step in (8, 9, 10):
        write_checksums(run.save_checkpoint(step))
    load_model(run.path)
    for step in (9, 10):
        path = max(
            (run.path / f"step{step}" / "model_and_optim").glob("*.distcp"), key=lambda path: path.stat().st_size
        )
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    good = rf"use the one before it, {run.path}/step8; training goes on from there with --from-checkpoint step8"
    with pytest.raises(UltraMemError, match=rf"step10/\S+ is damaged: it differs from its checksum; {good}$"):
        load_model(run.path)
    (run.path / "step8" / "checksums.json").write_text("{")
    with pytest.raises(UltraMemError, match=rf"use the one before it, {run.path}/step7;"):  # it has none
        load_model(run.path)


def test_devices(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda: PyTorch finds no CUDA device here; use cpu"):
        load_model(run.path, "cuda")
    with pytest.raises(ConfigError, match="device=tpu: must be auto, cpu or cuda"):
        load_model(run.path, "tpu")
    assert load_model(run.path, "auto")[0].device.type == "cpu"


def test_a_run_can_be_moved(run: Any, tmp_path: Path) -> None:
    moved = Path(shutil.move(run.path, tmp_path / "moved"))
    assert torch.equal(load_model(moved)[0].embeddings.weight, run.model.embeddings.weight)
