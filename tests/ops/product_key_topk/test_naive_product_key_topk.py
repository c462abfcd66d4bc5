"""Product-key retrieval against a sort of the whole grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ultramem.ops.product_key_topk.naive import best_sums, product_key_topk


def check_against_whole_grid(rows: Tensor, columns: Tensor, k: int) -> None:
    """The k best cells of the grid; with ties, any choice of as good cells."""
    scores, indices = best_sums(rows, columns, k)
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


def test_scores_are_products_of_queries_and_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 2, 2, 4, dtype=torch.float64, generator=generator)
    keys = torch.randn(2, 2, 6, 4, dtype=torch.float64, generator=generator)
    scores, indices = product_key_topk(queries, keys, 7)
    for token, head in itertools.product(range(3), range(2)):
        rows, columns = (keys[head, axis] @ queries[token, head, axis] for axis in range(2))
        best = (rows.unsqueeze(1) + columns).flatten().sort(descending=True)
        torch.testing.assert_close(scores[token, head].sort(descending=True).values, best.values[:7])
        assert set(indices[token, head].tolist()) == set(best.indices[:7].tolist())


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    scores, indices = product_key_topk(torch.randn(tokens, 2, 2, 3), torch.randn(2, 2, 5, 3), 4)
    assert scores.shape == indices.shape == (tokens, 2, 4)


def test_gradients_of_scores() -> None:
    # Distinct sums, far enough apart that gradcheck's steps do not change the choice.
    rows = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    columns = torch.tensor([[0.0, 0.1, 0.2, 0.3], [0.3, 0.1, 0.0, 0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, c: best_sums(r, c, 5)[0], (rows, columns))


def test_gradients_of_queries_and_keys() -> None:
    generator = torch.Generator().manual_seed(1)
    queries, keys = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((2, 2, 2, 3), (2, 2, 5, 3))
    )
    assert torch.autograd.gradcheck(lambda q, k: product_key_topk(q, k, 4)[0], (queries, keys))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_are_float32_or_wider(dtype: torch.dtype) -> None:
    queries, keys = torch.randn(2, 1, 2, 3, dtype=dtype), torch.randn(1, 2, 5, 3, dtype=dtype)
    scores, _ = product_key_topk(queries, keys, 3)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
