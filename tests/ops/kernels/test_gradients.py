"""Gradients of the scores of cells; `tests/ops/tucker_topk` and `tests/ops/product_key_topk` compare their values."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ultramem.ops.kernels.cells import best_cells
from ultramem.ops.kernels.gradients import best_cells_backward

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_keys_that_were_not_chosen_are_zero(weighted: bool, generator: torch.Generator) -> None:
    device, keys, k = generator.device, 300, 6
    scores = torch.randn(2, 2 if weighted else 1, 2, 1, keys, generator=generator, device=device)
    cores = torch.ones(1, 1, 2, 2, device=device) if weighted else None
    direction = torch.ones(1, 2, device=device) if weighted else None
    cells = best_cells(scores, keys, k, k, cores, direction, direction)
    gradients = torch.full_like(scores, torch.nan)
    best_cells_backward(torch.ones_like(cells.scores), cells.keys, cells.chosen_scores, gradients, cores)
    chosen = torch.zeros(2, 2, 1, keys, dtype=torch.bool, device=device)
    chosen.scatter_(3, cells.keys.long().permute(2, 0, 1, 3), True)
    assert torch.equal(gradients != 0, chosen.unsqueeze(1).expand_as(gradients))
    assert gradients.isfinite().all()
