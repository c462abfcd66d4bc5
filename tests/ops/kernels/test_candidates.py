"""The best keys of each axis against sorting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ultramem.ops.kernels.candidates import best_keys

pytestmark = pytest.mark.kernels

SIZES = [(1, 1), (3, 3), (31, 4), (33, 32), (64, 40), (257, 7), (300, 100), (1138, 32)]


def check(found: Tensor, ranking: Tensor, k: int) -> None:
    """Keys (tokens, heads, 2, k) are the best of the ranking (tokens, heads, 2, keys)."""
    assert all(len(set(chosen)) == k for chosen in found.flatten(0, 2).tolist())
    best = ranking.sort(-1, descending=True).values[..., :k]
    assert torch.equal(ranking.gather(-1, found.long()).sort(-1, descending=True).values, best)


@pytest.mark.parametrize(("keys", "k"), SIZES)
def test_of_one_rank(keys: int, k: int, generator: torch.Generator) -> None:
    scores = torch.randn(2, 1, 2, 1, keys, generator=generator, device=generator.device)
    found = best_keys(scores, keys, k, None, None, None, in_order=False)
    ranking = scores[:, 0].permute(1, 2, 0, 3)
    check(found.keys, ranking, k)
    assert torch.equal(found.scores.squeeze(3), ranking.gather(3, found.keys.long()))
    assert found.weighted_rows.numel() == 0


@pytest.mark.parametrize(("keys", "k"), SIZES)
def test_of_several_ranks(keys: int, k: int, generator: torch.Generator) -> None:
    """Small integers, of which sums and products are exact; the first rank alone ranks the keys."""
    device = generator.device
    ranks = torch.rand(2, 1, 2, 3, keys, generator=generator, device=device).argsort(-1).float()
    scores = torch.cat([ranks, torch.randint(-3, 4, ranks.shape, generator=generator, device=device)], 1)
    cores = torch.randint(-3, 4, (2, 3, 2, 2), generator=generator, device=device).float()
    direction = torch.tensor([[1.0, 0.0]] * 3, device=device)
    found = best_keys(scores, keys, k, cores, direction, -direction, in_order=True)
    ranking = ranks[:, 0].permute(1, 2, 0, 3) * torch.tensor([[1], [-1]], device=device)
    check(found.keys, ranking, k)
    assert torch.equal(ranking.gather(3, found.keys.long()), ranking.sort(3, descending=True).values[..., :k])
    places = found.keys.long().unsqueeze(3).expand(-1, -1, -1, 2, -1)
    assert torch.equal(found.scores, scores.permute(2, 3, 0, 1, 4).gather(4, places))
    assert torch.equal(found.weighted_rows, torch.einsum("thrk,chrs->thsk", found.scores[:, :, 0], cores))
