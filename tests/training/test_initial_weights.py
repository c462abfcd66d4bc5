"""Training that starts from another model's weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ultramem.convert.transformers_models import to_transformers
from ultramem.evaluation import load_model
from ultramem.training import OptimizerConfig, train

STANDING_STILL = OptimizerConfig(learning_rate=1e-12, weight_decay=0.0)


def write_model(config: Any, directory: Path) -> dict[str, torch.Tensor]:
    """A model with weights of its own, as a transformers directory."""
    model = config.model.build()
    model.init_weights(max_seq_len=16, device=torch.device("cpu"))
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    for name, tensor in state.items():
        if tensor.is_floating_point() and name.split(".")[-1] not in (
            "u",
            "t",
            "cores",
        ):  # the first two follow the last
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.01)
    state["lm_head.w_out.weight"] = state["embeddings.weight"]
    to_transformers(state, config.model).save_pretrained(directory)
    return state


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("system", ["dense", "ultramem_v2", "ultramem", "moe"])
def test_all_processes_start_from_them(
    system: str, processes: int, make_config: Any, in_children: Any, tmp_path: Path
) -> None:
    expected = write_model(make_config(system), tmp_path / "model")
    config = make_config(
        system, steps=1, initial_weights=tmp_path / "model", optimizer=STANDING_STILL, evaluate_interval=None
    )
    if processes == 1:
        train(config)
    else:
        assert in_children(lambda: train(config), processes) == [0] * processes
    model, _ = load_model(config.trainer.directory, "cpu")
    for name, tensor in model.state_dict().items():
        if "table." not in name:  # it has a learning rate of its own
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_an_interrupted_run_goes_on_from_its_own_checkpoint(make_config: Any, tmp_path: Path, losses_of: Any) -> None:
    write_model(make_config(), tmp_path / "model")
    options = {"initial_weights": tmp_path / "model", "checkpoint_interval": 2, "evaluate_interval": None}
    config = make_config(steps=4, **options)
    train(config)
    expected = losses_of(config.trainer.directory)
    shutil.rmtree(config.trainer.directory / "step4")
    assert train(config).step == 4
    assert losses_of(config.trainer.directory) == expected
