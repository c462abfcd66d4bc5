"""Finding the places of the largest numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultramem.ops import largest as module
from ultramem.ops.largest import largest

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 5), st.integers(1, 40), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_equals_topk(
    data: st.DataObject, lines: int, n: int, dtype: torch.dtype, ties: bool, sorts_vectors: bool
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    k = data.draw(st.integers(1, n))
    scores = torch.randn(2, lines, n, generator=generator).mul(2 if ties else 1e3)
    scores = (scores.round() if ties else scores).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SORTS_VECTORS", sorts_vectors)
        found = largest(scores, k)
    assert found.dtype == torch.int64
    assert found.shape == (2, lines, k)
    assert all(len(set(line)) == k for line in found.flatten(0, 1).tolist())
    assert torch.equal(scores.gather(-1, found).sort(-1, descending=True).values, scores.topk(k).values)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_numbers_that_are_not_finite(number: float, count: int) -> None:
    """One line has some; the others are found as ever. PyTorch counts NaN as the largest."""
    scores = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    scores[1, :count] = number
    found, expected = scores.gather(-1, largest(scores, 3)), scores.topk(3).values
    torch.testing.assert_close(found.sort(descending=True).values, expected, equal_nan=True)


def test_scores_with_a_gradient() -> None:
    assert largest(torch.tensor([1.0, 3.0, 2.0], requires_grad=True).unsqueeze(0), 1).tolist() == [[1]]
