"""Weighted sums of rows against explicit loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ultramem.ops.weighted_lookup.naive import weighted_lookup
from ultramem.ops.weighted_lookup.reads import Reads

TABLE_ROWS = 6


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


ACTIVATIONS = {None: lambda x: x, "gelu": gelu, "silu": silu}


def by_loops(
    scores: Tensor,
    rows: Tensor,
    values: Tensor,
    pre_input: Tensor | None,
    pre_values: Tensor | None,
    pre_activation: str | None,
    copies: Tensor | None,
    num_copies: int,
) -> Tensor:
    tokens, k, cores = scores.shape
    width = values.shape[1]
    output = torch.zeros(tokens, num_copies, width, dtype=torch.float64)
    for token in range(tokens):
        for chosen in range(k):
            row = rows[token, chosen].item()
            factor = 1.0
            if pre_input is not None and pre_values is not None:
                factor = ACTIVATIONS[pre_activation](float(pre_input[token] @ pre_values[row]))
            copy = 0 if copies is None else copies[token, chosen].item()
            for column in range(width):
                core = column // (width // cores)
                output[token, copy, column] += scores[token, chosen, core] * factor * values[row, column]
    return output.flatten(1)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 3),
    k=st.integers(1, 8),
    cores=st.integers(1, 3),
    slice_width=st.integers(1, 3),
    pre_width=st.integers(0, 3),
    pre_activation=st.sampled_from([None, "gelu", "silu"]),
    num_copies=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
def test_equals_loops(
    tokens: int,
    k: int,
    cores: int,
    slice_width: int,
    pre_width: int,
    pre_activation: str | None,
    num_copies: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    scores, values = normal(tokens, k, cores), normal(TABLE_ROWS, cores * slice_width)
    pre_input, pre_values = (normal(tokens, pre_width), normal(TABLE_ROWS, pre_width)) if pre_width else (None, None)
    rows = torch.randint(TABLE_ROWS, (tokens, k), generator=generator)  # with k > 6 some are repeated
    copies = torch.randint(num_copies, (tokens, k), generator=generator) if num_copies else None
    expected = by_loops(scores, rows, values, pre_input, pre_values, pre_activation, copies, max(num_copies, 1))

    reads = Reads(rows, scores, pre_input, pre_activation, copies, max(num_copies, 1))
    result = weighted_lookup(reads, values, pre_values)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("num_copies", [0, 3])
@pytest.mark.parametrize("pre_activation", [None, "gelu", "silu"])
def test_gradients(pre_activation: str | None, num_copies: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((3, 5, 2), (TABLE_ROWS, 4), (3, 2), (TABLE_ROWS, 2))
    )
    rows = torch.randint(TABLE_ROWS, (3, 5), generator=generator)
    copies = torch.randint(num_copies, (3, 5), generator=generator) if num_copies else None

    def lookup(scores: Tensor, values: Tensor, pre_input: Tensor, pre_values: Tensor) -> Tensor:
        return weighted_lookup(
            Reads(rows, scores, pre_input, pre_activation, copies, num_copies or 1), values, pre_values
        )

    assert torch.autograd.gradcheck(lookup, inputs)
    assert torch.autograd.gradgradcheck(lookup, inputs)


def test_narrow_scores_and_wide_values() -> None:
    """Mixed dtypes, as under autocast, give the table's."""
    rows = torch.tensor([[0, 1]])
    values = torch.randn(TABLE_ROWS, 4)
    result = weighted_lookup(Reads(rows, torch.ones(1, 2, 2, dtype=torch.bfloat16)), values)
    torch.testing.assert_close(result, values[:2].sum(0, keepdim=True))
