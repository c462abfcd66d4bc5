"""Lookups that copy no rows against the definition."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comparison import assert_near
from ultramem.ops import use_backend
from ultramem.ops.weighted_lookup import bags, naive, weighted_lookup
from ultramem.ops.weighted_lookup.reads import Reads


class Case:
    """Random reads and a table in float64."""

    def __init__(
        self, seed: int, sizes: tuple[int, int, int, int, int, int], activation: str | None = None, copies: int = 0
    ) -> None:
        tokens, k, table_rows, cores, width, pre_width = sizes
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

        table_rows = max(table_rows, k)
        self.rows = torch.randint(table_rows, (tokens, k), generator=generator)
        self.copies = torch.randint(copies, (tokens, k), generator=generator) if copies else None
        self.activation, self.num_copies = activation, copies or 1
        self.inputs = [normal(tokens, k, cores), normal(table_rows, cores * width)]
        if pre_width:
            self.inputs += [normal(tokens, pre_width), normal(table_rows, pre_width)]

    def by_definition(self, *inputs: Tensor) -> Tensor:
        reads, tables = self._arguments(inputs)
        return naive.weighted_lookup(reads, *tables)

    def in_bags(self, *inputs: Tensor) -> Tensor:
        reads, tables = self._arguments(inputs)
        assert bags.supports(reads, *tables)
        return bags.weighted_lookup(reads, *(None if table is None else bags.Source(table) for table in tables))

    def _arguments(self, inputs: tuple[Tensor, ...]) -> tuple[Reads, tuple[Tensor, Tensor | None]]:
        scores, values, pre_input, pre_values = (*inputs, None, None)[:4]
        assert scores is not None
        assert values is not None
        reads = Reads(self.rows, scores, pre_input, self.activation, self.copies, self.num_copies)
        return reads, (values, pre_values)


# Tokens, k, rows of the table, cores, width of a core's slice, width of pre-values: more reads than rows, and fewer.
SIZES = [(7, 5, 6, 2, 3, 2), (3, 2, 40, 2, 3, 2), (4, 6, 6, 1, 2, 3)]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(
        st.integers(1, 9),
        st.integers(1, 8),
        st.integers(1, 60),
        st.integers(1, 3),
        st.integers(1, 9),
        st.integers(0, 20),
    ),
    activation=st.sampled_from([None, "gelu", "silu"]),
    copies=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
def test_equals_the_definition(
    sizes: tuple[int, int, int, int, int, int], activation: str | None, copies: int, seed: int
) -> None:
    case = Case(seed, sizes, activation, copies)
    expected, found = case.by_definition(*case.inputs), case.in_bags(*case.inputs)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gradients = (torch.autograd.grad(result, case.inputs, gradient) for result in (expected, found))
    for wanted, got in zip(*gradients, strict=True):
        assert_near(got, wanted, 1e-12)


@pytest.mark.parametrize("copies", [0, 3])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("sizes", SIZES)
def test_first_and_second_derivatives(
    sizes: tuple[int, int, int, int, int, int], activation: str | None, copies: int
) -> None:
    case = Case(0, sizes, activation, copies)
    assert torch.autograd.gradcheck(case.in_bags, case.inputs)
    assert torch.autograd.gradgradcheck(case.in_bags, case.inputs)


@pytest.mark.parametrize("sizes", [(300, 16, 500, 2, 32, 16), (30, 16, 5000, 2, 32, 16)])
def test_float32_is_as_near_as_the_definition_in_float32(sizes: tuple[int, int, int, int, int, int]) -> None:
    case = Case(1, sizes, "silu", 2)
    narrow = [part.detach().float().requires_grad_() for part in case.inputs]
    gradient = torch.randn_like(case.by_definition(*case.inputs))
    expected = torch.autograd.grad(case.by_definition(*case.inputs), case.inputs, gradient)
    found = torch.autograd.grad(case.in_bags(*narrow), narrow, gradient.float())
    for wanted, got in zip(expected, found, strict=True):
        assert_near(got, wanted, 1e-5)


def test_the_same_from_run_to_run_to_the_bit() -> None:
    case = Case(2, (300, 16, 100, 2, 32, 16), "silu", 2)
    narrow = [part.detach().float().requires_grad_() for part in case.inputs]
    first, second = (torch.autograd.grad(case.in_bags(*narrow).square().sum(), narrow) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_chosen_on_a_cpu_where_all_operations_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.dtype] = []
    lookup = bags.weighted_lookup

    def noting(reads: Reads, values: bags.Source, pre_values: bags.Source | None = None) -> Tensor:
        taken.append(values.table.dtype)
        return lookup(reads, values, pre_values)

    monkeypatch.setattr(bags, "weighted_lookup", noting)
    reads = Reads(torch.tensor([[0, 2]]), torch.ones(1, 2, 2))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        values = torch.ones(3, 4, dtype=dtype)
        assert weighted_lookup(reads, values).tolist() == [[2.0] * 4]
        assert weighted_lookup(reads, values.t().contiguous().t()).tolist() == [[2.0] * 4]
        with use_backend("naive"):
            weighted_lookup(reads, values)
    assert weighted_lookup(reads._replace(rows=reads.rows[:0], scores=reads.scores[:0]), values).shape == (0, 4)
    assert taken == [torch.float32, torch.float64]


def test_nothing_is_said_about_sparse_tensors() -> None:
    case = Case(0, SIZES[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.in_bags(*case.inputs).sum().backward()
