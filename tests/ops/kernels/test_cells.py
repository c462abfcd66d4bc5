"""The kernels that choose cells, exactly: from given scores that they add and multiply without rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ultramem.ops.kernels.cells import Cells, best_cells

pytestmark = pytest.mark.kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PADDING = 3  # scores behind the last key, better than all others, that must not be looked at


def padded(scores: Tensor) -> Tensor:
    return torch.cat([scores, torch.full_like(scores[..., :PADDING], 1e4)], -1)


def check_cells(cells: Cells, keys: int, grid: Tensor) -> None:
    """The cells are the best of the grid (tokens, heads, keys, keys); with ties, any choice of as good ones."""
    k = cells.indices.shape[2]
    rows, columns = cells.keys.long().unbind(2)
    assert ((rows >= 0) & (rows < keys) & (columns >= 0) & (columns < keys)).all()
    assert torch.equal(cells.indices, rows * keys + columns)
    assert all(len(set(chosen)) == k for chosen in cells.indices.flatten(0, 1).tolist())
    sums = cells.scores.sum(-1)
    assert torch.equal(sums, grid.flatten(2).gather(2, cells.indices))
    best = grid.flatten(2).sort(descending=True).values[..., :k]
    assert torch.equal(sums.sort(descending=True).values, best)


def check_sums(scores: Tensor, k: int) -> None:
    """Of row and column scores (2, tokens, heads, keys)."""
    keys = scores.shape[-1]
    cells = best_cells(padded(scores).unsqueeze(1), keys, k, min(k, keys))
    rows, columns = scores.float()
    check_cells(cells, keys, rows.unsqueeze(3) + columns.unsqueeze(2))


SUM_SIZES = [(1, 1), (3, 9), (3, 4), (31, 5), (32, 32), (33, 33), (64, 40), (127, 1), (257, 7), (1493, 4), (20, 100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keys", "k"), SUM_SIZES)
def test_sums(keys: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    scores = torch.randn(2, 1, 1, keys, generator=generator, device=generator.device).to(dtype)
    check_sums(scores, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keys", "k"), [(5, 6), (40, 33), (300, 12)])
def test_sums_with_many_ties(keys: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    scores = torch.randint(-2, 3, (2, 1, 2, keys), generator=generator, device=generator.device)
    scores[:, :, 1] = 0  # all the same
    check_sums(scores.to(dtype), k)


def test_neighbouring_numbers(device: torch.device) -> None:
    """Scores that differ in their last bit only, large and small, of either sign."""
    start = torch.tensor([1.0, -1.0, 1e17, -1e-30], device=device).view(4, 1)
    image = start.view(torch.int32) + torch.arange(40, dtype=torch.int32, device=device)
    rows = image.view(torch.float32)
    check_sums(torch.stack([rows, torch.zeros_like(rows)]).unsqueeze(2), 7)


WEIGHTED_SIZES = [
    # keys, axis_k, k
    (3, 3, 9),
    (3, 1, 1),
    (31, 4, 16),
    (32, 32, 5),
    (33, 7, 31),
    (64, 64, 64),
    (100, 33, 40),
    (200, 40, 20),
    (129, 17, 256),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keys", "axis_k", "k"), WEIGHTED_SIZES)
def test_weighted_cells(keys: int, axis_k: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Small integers, of which many cells tie. Keys are ranked by their first rank, in which none tie."""
    device = generator.device

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    ranking = torch.rand(2, 1, 1, keys, generator=generator, device=device).argsort(-1) - keys // 2
    scores = torch.stack([ranking, integers(-2, 3, 2, 1, 1, keys)], 1).to(dtype)
    cores = integers(-2, 3, 3, 1, 2, 2).float()
    u, t = (torch.tensor([[weight, 0.0]], device=device) for weight in (0.5, 2.0))
    cells = best_cells(padded(scores), keys, k, axis_k, cores, u, t)

    core_grids = torch.einsum("rthi,chrs,sthj->thijc", scores[0].float(), cores, scores[1].float())
    assert torch.equal(
        cells.scores, core_grids.flatten(2, 3).gather(2, cells.indices.unsqueeze(3).expand(-1, -1, -1, 3))
    )
    chosen_scores = torch.stack(
        [scores[axis].permute(1, 2, 0, 3)[..., cells.keys[0, 0, axis].long()] for axis in (0, 1)], 2
    )
    assert torch.equal(cells.chosen_scores, chosen_scores)
    left_out = ranking.argsort(-1, descending=True)[..., axis_k:]
    grid = core_grids.sum(-1)
    grid.scatter_(2, left_out[0].unsqueeze(3).expand(-1, -1, -1, keys), -torch.inf)
    grid.scatter_(3, left_out[1].unsqueeze(2).expand(-1, -1, keys, -1), -torch.inf)
    check_cells(cells, keys, grid)


@pytest.mark.gpu  # NumPy's minimum, in the interpreter, hands NaN on
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_not_a_number(dtype: torch.dtype, generator: torch.Generator) -> None:
    scores = torch.randn(2, 6, 1, 100, generator=generator, device=generator.device)
    scores[0, 0, 0, :3] = torch.inf
    scores[1, 1, 0, ::2] = -torch.inf
    scores[0, 2] = torch.inf
    scores[0, 3] = -torch.inf
    check_sums(scores[:, :4].to(dtype), 20)
    scores[0, :, 0, 5] = torch.nan  # the largest
    cells = best_cells(scores.to(dtype).unsqueeze(1), 100, 20, 20)
    assert (cells.keys[4:, :, 0] == 5).all()
    assert all(len(set(chosen)) == 20 for chosen in cells.indices.flatten(0, 1).tolist())
    assert ((cells.indices >= 0) & (cells.indices < 100**2)).all()
