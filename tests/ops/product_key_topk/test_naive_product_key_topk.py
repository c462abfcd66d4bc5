"""Product-key retrieval against a sort of the whole grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ultramem.ops.product_key_topk.naive import product_key_topk


def check_against_whole_grid(rows: Tensor, columns: Tensor, k: int) -> None:
    """The k best cells of the grid; with ties, any choice of as good cells."""
    scores, indices = product_key_topk(rows, columns, k)
    assert scores.shape == indices.shape == (*rows.shape[:-1], k)
    assert indices.dtype == torch.int64
    grid = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(-2)
    torch.testing.assert_close(scores, grid.sort(descending=True).values[..., :k], rtol=0, atol=0)
    torch.testing.assert_close(grid.gather(-1, indices), scores, rtol=0, atol=0)
    assert all(len(set(chosen)) == k for chosen in indices.view(-1, k).tolist())


@st.composite
def grids(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    row_keys, column_keys, heads = (draw(st.integers(1, high)) for high in (12, 12, 3))
    k = draw(st.integers(1, row_keys * column_keys))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):  # few distinct values: ties and duplicate keys
        rows = torch.randint(-2, 3, (4, heads, row_keys), generator=generator).double()
        columns = torch.randint(-2, 3, (4, heads, column_keys), generator=generator).double()
    else:
        rows = torch.randn(4, heads, row_keys, dtype=torch.float64, generator=generator)
        columns = torch.randn(4, heads, column_keys, dtype=torch.float64, generator=generator)
    return rows, columns, k


@settings(max_examples=200, deadline=None)
@given(grids())
def test_equals_the_best_of_the_whole_grid(grid: tuple[Tensor, Tensor, int]) -> None:
    check_against_whole_grid(*grid)


@pytest.mark.parametrize("k", [1, 7, 32, 80])
def test_larger_grids(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    rows = torch.randn(8, 40, dtype=torch.float64, generator=generator)
    columns = torch.randn(8, 50, dtype=torch.float64, generator=generator)
    check_against_whole_grid(rows, columns, k)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    scores, indices = product_key_topk(torch.randn(tokens, 2, 5), torch.randn(tokens, 2, 6), 4)
    assert scores.shape == indices.shape == (tokens, 2, 4)


def test_gradients() -> None:
    # Distinct sums, far enough apart that gradcheck's steps do not change the choice.
    rows = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    columns = torch.tensor([[0.0, 0.1, 0.2, 0.3], [0.3, 0.1, 0.0, 0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, c: product_key_topk(r, c, 5)[0], (rows, columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    scores, _ = product_key_topk(torch.randn(2, 5, dtype=dtype), torch.randn(2, 5, dtype=dtype), 3)
    assert scores.dtype == dtype
