"""Tucker retrieval against loops over the grid."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ultramem.ops.tucker_topk.naive import best_cells, tucker_topk

TOKENS = 2


@dataclass
class Case:
    rows: Tensor
    columns: Tensor
    cores: Tensor
    u: Tensor
    t: Tensor
    k: int
    axis_k: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ties, whole_grid = draw(st.booleans()), draw(st.booleans())
    # Ties at the cut of an axis leave many valid choices of candidates, which the test enumerates.
    keys = draw(st.integers(1, 12 if whole_grid or not ties else 6))
    heads, rank, cores = (draw(st.integers(1, 3)) for _ in range(3))
    axis_k = keys if whole_grid else draw(st.integers(1, keys))
    k = draw(st.integers(1, axis_k**2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def tensor(*shape: int) -> Tensor:
        if ties:  # small integers: exact in float64, and many of them equal
            return torch.randint(-1, 2, shape, generator=generator).double()
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    rows, columns = tensor(TOKENS, heads, rank, keys), tensor(TOKENS, heads, rank, keys)
    if draw(st.booleans()):  # a duplicate key
        rows[..., -1] = rows[..., 0]
    return Case(rows, columns, tensor(cores, heads, rank, rank), tensor(heads, rank), tensor(heads, rank), k, axis_k)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equals_loops_over_the_grid(case: Case) -> None:
    scores, indices = best_cells(
        torch.stack([case.rows, case.columns]), case.cores, case.u, case.t, case.k, case.axis_k
    )
    cores, heads, keys = case.cores.shape[0], case.rows.shape[1], case.rows.shape[-1]
    assert scores.shape == (TOKENS, heads, case.k, cores)
    assert indices.shape == (TOKENS, heads, case.k)
    for token, head in itertools.product(range(TOKENS), range(heads)):
        row, column = case.rows[token, head].numpy(), case.columns[token, head].numpy()
        core_grids = np.stack([row.T @ case.cores[c, head].numpy() @ column for c in range(cores)], -1)
        chosen = indices[token, head].numpy()
        assert len(set(chosen.tolist())) == case.k
        np.testing.assert_allclose(scores[token, head], core_grids[chosen // keys, chosen % keys], atol=1e-9)

        sums = np.sort(scores[token, head].sum(-1))[::-1]  # cells come in any order
        choices = itertools.product(
            best_choices(case.u[head].numpy() @ row, case.axis_k),
            best_choices(case.t[head].numpy() @ column, case.axis_k),
        )
        grid = core_grids.sum(-1)
        best = (np.sort(grid[np.ix_(i, j)], axis=None)[::-1][: case.k] for i, j in choices)
        assert any(np.allclose(sums, expected, atol=1e-9) for expected in best)


def best_choices(scores: np.ndarray, count: int) -> list[tuple[int, ...]]:
    """All sets of `count` positions of which none scores less than a position left out."""
    cut = np.sort(scores)[-count]
    above = tuple(np.flatnonzero(scores > cut + 1e-12).tolist())
    at_cut = np.flatnonzero(abs(scores - cut) <= 1e-12).tolist()
    return [above + rest for rest in itertools.combinations(at_cut, count - len(above))]


def test_scores_are_products_of_queries_and_keys() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    queries, keys, cores, u, t = (
        normal(3, 2, 2, 4),
        normal(2, 2, 6, 2, 4),
        normal(3, 2, 2, 2),
        normal(2, 2),
        normal(2, 2),
    )
    rows, columns = torch.zeros(2, 3, 2, 2, 6, dtype=torch.float64)
    for token, head, rank, key in itertools.product(range(3), range(2), range(2), range(6)):
        rows[token, head, rank, key] = queries[token, 0, rank] @ keys[head, 0, key, rank]
        columns[token, head, rank, key] = queries[token, 1, rank] @ keys[head, 1, key, rank]
    scores, indices = tucker_topk(queries, keys, cores, u, t, 7, 3)
    expected_scores, expected_indices = best_cells(torch.stack([rows, columns]), cores, u, t, 7, 3)
    torch.testing.assert_close(scores, expected_scores)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    vector, cores = torch.ones(2, 3), torch.ones(4, 2, 3, 3)
    scores, indices = tucker_topk(torch.randn(tokens, 2, 3, 5), torch.randn(2, 2, 7, 3, 5), cores, vector, vector, 5, 3)
    assert scores.shape == (tokens, 2, 5, 4)
    assert indices.shape == (tokens, 2, 5)


def test_gradients() -> None:
    # Candidates and cells are far enough apart that gradcheck's steps do not change the choice.
    generator = torch.Generator().manual_seed(1)
    queries, keys, cores = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((2, 2, 2, 3), (2, 2, 5, 2, 3), (3, 2, 2, 2))
    )
    u = torch.randn(2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: tucker_topk(*inputs, u, u, 4, 3)[0], (queries, keys, cores))
    tucker_topk(queries, keys, cores, u, u, 4, 3)[0].sum().backward()
    assert u.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_are_float32_or_wider(dtype: torch.dtype) -> None:
    cores, vector = torch.ones(1, 1, 2, 2), torch.ones(1, 2)
    queries, keys = torch.randn(2, 2, 2, 3, dtype=dtype), torch.randn(1, 2, 5, 2, 3, dtype=dtype)
    scores, _ = tucker_topk(queries, keys, cores.to(dtype), vector.to(dtype), vector.to(dtype), 3, 3)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)


def test_a_negative_direction_inverts_the_ranking() -> None:
    """Why the sign of u and t matters: the best and the worst keys change places."""
    scores = torch.tensor([1.0, 2.0, 3.0, -4.0]).expand(2, 1, 1, 1, 4)
    one = torch.ones(1, 1)
    _, best = best_cells(scores, one.view(1, 1, 1, 1), one, one, 1, 2)
    _, worst = best_cells(scores, one.view(1, 1, 1, 1), -one, -one, 1, 2)
    assert best.item() == 2 * 4 + 2
    assert worst.item() == 3 * 4 + 3
