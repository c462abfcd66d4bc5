"""The definition against the whole grid written out, the kernels against the definition, hostile input for both."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from comparison import assert_near
from ultramem import UltraMemError
from ultramem.ops import use_backend
from ultramem.ops.choose_reads import choose_reads, naive
from ultramem.ops.choose_reads.grid import Grid, GridSizes

BACKENDS = [pytest.param("fused", marks=pytest.mark.kernels), "naive"]


class Case(NamedTuple):
    """What makes a search: without cores, sums of one rank."""

    num_keys: int = 9
    k: int = 4
    axis_k: int = 4
    rank: int = 2
    heads: int = 1
    cores: int = 2
    key_dim: int = 5
    padded: int = 0
    normed: bool = True
    query_per_rank: bool = True
    expansion: int = 1
    separate: bool = False


CASES = [
    Case(),
    Case(num_keys=70, k=32, axis_k=32, padded=58, key_dim=24),
    Case(num_keys=33, k=40, axis_k=33, key_dim=130, normed=False),
    Case(num_keys=7, k=30, axis_k=6, heads=3, rank=1, cores=1),
    Case(num_keys=12, k=10, axis_k=12, heads=2, rank=3, query_per_rank=False, expansion=2, separate=True, padded=4),
    Case(num_keys=6, k=1, axis_k=1, rank=4, cores=3, expansion=3),
    Case(cores=0, rank=1, heads=2),
    Case(num_keys=40, k=33, axis_k=33, cores=0, rank=1, key_dim=16, normed=False),
    Case(num_keys=3, k=9, axis_k=3, cores=0, rank=1),
]
LARGE = [
    Case(num_keys=1138, k=32, axis_k=32, padded=14, key_dim=16),
    Case(num_keys=1493, k=128, axis_k=128, padded=43, key_dim=16),
    Case(num_keys=2500, k=100, axis_k=100, cores=0, rank=1, key_dim=16),
]


def search(
    case: Case, tokens: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Grid]:
    """Queries and a grid of random numbers."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    if case.cores:
        steps = case.rank if case.query_per_rank else 1, int(case.query_per_rank), 0
        num_queries = 2 * steps[0]
    else:
        steps, num_queries = (1, 0, 2), 2 * case.heads
    keys = randn(2, case.rank, case.heads, case.num_keys + case.padded, case.key_dim)
    keys[:, :, :, case.num_keys :] = 1e3  # padding that would win
    cells, window_rows = case.num_keys**2, (case.num_keys // case.expansion) ** 2
    grid = Grid(
        keys=keys,
        sizes=GridSizes(case.num_keys, case.k, case.axis_k, case.rank, case.heads),
        query_steps=steps,
        norm_eps=1e-5 if case.normed else None,
        cores=randn(case.cores, case.heads, case.rank, case.rank).to(wide) if case.cores else None,
        u=randn(case.heads, case.rank).to(wide) if case.cores else None,
        t=randn(case.heads, case.rank).to(wide) if case.cores else None,
        shuffle=torch.randperm(cells, generator=generator, device=generator.device) if case.cores else None,
        window_start=window_rows // 2,
        window_rows=window_rows,
        table_rows=window_rows + window_rows // 4,
        separate_copies=case.separate,
    )
    return randn(tokens, num_queries + 1, case.key_dim)[:, :num_queries], grid  # a view, as of a joined projection


def in_order(found: tuple[Tensor, Tensor, Tensor | None], heads: int) -> list[Tensor]:
    """Rows, scores and copies of each head by row and copy."""
    rows, scores, copies = found
    marks = rows if copies is None else rows * 1000 + copies
    order = marks.unflatten(1, (heads, -1)).argsort(-1)
    parts = (
        part.unflatten(1, (heads, -1)) for part in (rows, *scores.unbind(-1), *([] if copies is None else [copies]))
    )
    return [part.gather(-1, order) for part in parts]


def by_the_whole_grid(queries: Tensor, grid: Grid, token: int, head: int) -> tuple[Tensor, Tensor]:
    """Virtual rows and scores (k,), (k, cores) of one token and head: loops over ranks, all cells at once."""
    sizes, (axis_step, rank_step, head_step) = grid.sizes, grid.query_steps
    axes = torch.empty(2, sizes.rank, sizes.num_keys, dtype=torch.float64)
    for axis in range(2):
        for rank in range(sizes.rank):
            query = queries[token, axis * axis_step + rank * rank_step + head * head_step]
            if grid.norm_eps is not None:
                query = query / (query.square().mean() + grid.norm_eps).sqrt()
            axes[axis, rank] = grid.keys[axis, rank, head, : sizes.num_keys] @ query
    if grid.cores is None:
        cells = axes[0, 0][:, None] + axes[1, 0][None, :]
        best, chosen = cells.flatten().topk(sizes.k)
        return chosen, best.softmax(0)[:, None]
    assert grid.u is not None
    assert grid.t is not None
    assert grid.shuffle is not None
    of_cores = torch.einsum("ri,crs,sj->cij", axes[0], grid.cores[:, head], axes[1])
    cells = of_cores.sum(0)
    for axis, direction in enumerate((grid.u, grid.t)):
        ranking = direction[head] @ axes[axis]
        left_out = ranking.argsort(descending=True)[sizes.axis_k :]
        cells.index_fill_(axis, left_out, -math.inf)
    chosen = cells.flatten().topk(sizes.k).indices
    return grid.shuffle[chosen], of_cores.flatten(1)[:, chosen].T


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case: Case) -> None:
    queries, grid = search(case, 3, torch.Generator().manual_seed(0))
    rows, scores, copies = naive.choose_reads(queries, grid)
    assert (copies is not None) == case.separate
    for token in range(3):
        for head in range(case.heads):
            virtual, expected_scores = by_the_whole_grid(queries, grid, token, head)
            expected = (virtual % grid.window_rows + grid.window_start) % grid.table_rows
            place = slice(head * case.k, (head + 1) * case.k)
            found = scores[token, place].sum(1).sort(descending=True).indices + head * case.k  # they come in any order
            best = expected_scores.sum(1).sort(descending=True).indices
            assert torch.equal(rows[token, found], expected[best])
            torch.testing.assert_close(scores[token, found], expected_scores[best])
            if copies is not None:
                assert torch.equal(copies[token, found], virtual[best] // grid.window_rows)


def narrowed(grid: Grid, dtype: torch.dtype) -> Grid:
    wide = torch.promote_types(dtype, torch.float32)
    parts = {name: part if (part := getattr(grid, name)) is None else part.to(wide) for name in ("cores", "u", "t")}
    return replace(grid, keys=grid.keys.to(dtype), **parts)


def check(case: Case, tokens: int, generator: torch.Generator) -> None:
    """In float32; of tokens whose best cells are not distinct enough, there are hardly any."""
    queries, grid = search(case, tokens, generator)
    expected = in_order(naive.choose_reads(queries, grid), case.heads)
    with use_backend("fused"):
        found = in_order(choose_reads(queries.float(), narrowed(grid, torch.float32)), case.heads)
    assert found[0].dtype == torch.int64
    same = (found[0] == expected[0]).all(-1).all(-1)
    assert same.double().mean() > (0.6 if tokens > 1 else -1)
    for part, wanted in zip(found, expected, strict=True):
        assert_near(part[same].double(), wanted[same].double(), 1e-4)


@pytest.mark.kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case: Case, generator: torch.Generator) -> None:
    check(case, 3, generator)


@pytest.mark.kernels
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_grids(case: Case, generator: torch.Generator) -> None:
    check(case, 2, generator)


@pytest.mark.kernels
@pytest.mark.parametrize("tokens", [1, 70])
def test_other_numbers_of_tokens(tokens: int, generator: torch.Generator) -> None:
    check(CASES[0], tokens, generator)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[7]], ids=str)
def test_narrow_types(case: Case, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Rounding may choose other cells, hardly worse: best scores are near the exact best."""
    queries, grid = search(case, 3, generator, dtype)
    with use_backend("fused"):
        rows, scores, copies = choose_reads(queries, grid)
    wide = narrowed(grid, torch.float64)
    _, exact, _ = naive.choose_reads(queries.double(), wide)
    assert scores.dtype == torch.float32
    marks = rows if copies is None else rows * 1000 + copies
    if case.expansion == 1 or copies is not None:
        assert all(
            len(set(of_head)) == case.k for of_head in marks.unflatten(1, (case.heads, -1)).flatten(0, 1).tolist()
        )
    best, expected = (part.unflatten(1, (case.heads, -1)).sum(-1).sort(-1).values for part in (scores, exact))
    assert_near(best, expected, {torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[8]], ids=str)
@pytest.mark.parametrize(
    ("where", "number"),
    [("all", math.nan), ("all", math.inf), ("queries", -math.inf), ("keys", 3e38), ("u", math.nan), ("cores", 1e38)],
)
def test_hostile_scores_choose_rows_of_the_table(
    case: Case, where: str, number: float, backend: Any, generator: torch.Generator
) -> None:
    """Different cells, all of the window, whatever the scores are."""
    queries, grid = search(case._replace(separate=True), 1, generator, torch.float32)
    for name in ("queries", "keys", "u", "cores") if where == "all" else (where,):
        part = queries if name == "queries" else getattr(grid, name)
        if part is not None:
            part.copy_(
                torch.where(torch.rand(part.shape, device=part.device) < (1 if where == "all" else 0.4), number, part)
            )
    with use_backend(backend):
        rows, _, copies = choose_reads(queries, grid)
    assert copies is not None
    in_window = (rows - grid.window_start) % grid.table_rows
    assert ((in_window >= 0) & (in_window < grid.window_rows)).all()
    assert ((rows >= 0) & (rows < grid.table_rows)).all()
    cells = (copies * grid.window_rows + in_window).unflatten(1, (case.heads, -1))
    assert all(len(set(of_head)) == case.k for of_head in cells.flatten(0, 1).tolist())


@pytest.mark.kernels
def test_ties(generator: torch.Generator) -> None:
    """Small integers: scores are exact, many of them equal, and the best of them known whatever is chosen."""
    queries, grid = search(Case(num_keys=20, k=30, axis_k=20, normed=False), 2, generator)
    for part in (queries, grid.keys, grid.cores, grid.u, grid.t):
        assert part is not None
        part.copy_(part.sign())
    grid.keys[:, :, :, 10:] = grid.keys[:, :, :, :10]
    with use_backend("fused"):
        rows, scores, _ = choose_reads(queries.float(), narrowed(grid, torch.float32))
    assert all(len(set(of_token)) == 30 for of_token in rows.tolist())
    _, best, _ = naive.choose_reads(queries, grid)
    assert torch.equal(scores.sum(-1).sort().values.double(), best.sum(-1).sort().values)


@pytest.mark.kernels
def test_what_is_supported(generator: torch.Generator) -> None:
    queries, grid = search(Case(), 2, generator)
    with use_backend("fused"), pytest.raises(UltraMemError, match="choose_reads has no fused kernel"):
        choose_reads(queries, grid)
    for sizes in (grid.sizes._replace(k=129), grid.sizes._replace(num_keys=8193), grid.sizes._replace(rank=5)):
        with use_backend("fused"), pytest.raises(UltraMemError):
            choose_reads(queries.float(), replace(narrowed(grid, torch.float32), sizes=sizes))
