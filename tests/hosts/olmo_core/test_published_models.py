"""Whole models against the logits of the published code, from its own checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ultramem.convert.published_checkpoint import read_published_checkpoint

CHECKPOINTS = Path(__file__).parents[2] / "golden" / "olmo_checkpoints"


@pytest.mark.parametrize("name", ["memory_plus", "ultramem_v1", "ultramem_v2"])
def test_logits(name: str) -> None:
    config, state = read_published_checkpoint(CHECKPOINTS / name)
    model = config.build()
    model.load_state_dict(state)
    arrays = np.load(CHECKPOINTS / name / "logits.npz")
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(arrays["input_ids"]))
    expected = torch.from_numpy(arrays["logits"])
    assert (logits - expected).norm() < 1e-5 * expected.norm()
