"""Nothing beyond a table is read or written, whatever the scores are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ultramem.ops import use_backend
from ultramem.ops.product_key_topk import product_key_topk
from ultramem.ops.tucker_topk import tucker_topk
from ultramem.ops.weighted_lookup import weighted_lookup
from ultramem.ops.weighted_lookup.reads import Reads

BACKENDS = [pytest.param("fused", marks=pytest.mark.kernels), "naive"]


def surrounded(rows: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A table in the midst of NaNs, and all of it."""
    whole = torch.full((rows + 10, width), torch.nan, device=generator.device)
    whole[5 : rows + 5] = torch.randn(rows, width, generator=generator, device=generator.device)
    return whole[5 : rows + 5], whole


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("value_dim", "pre_dim", "cores"), [(6, 5, 2), (7, 0, 1), (64, 33, 2)])
def test_the_first_and_the_last_row(
    backend: str, value_dim: int, pre_dim: int, cores: int, generator: torch.Generator
) -> None:
    device = generator.device
    values, all_values = surrounded(11, value_dim, generator)
    pre_values, all_pre_values = surrounded(11, pre_dim, generator) if pre_dim else (None, None)
    rows = torch.tensor([[0, 10, 10], [10, 0, 0]], device=device)
    scores = torch.randn(2, 3, cores, generator=generator, device=device).requires_grad_()
    pre_input = torch.randn(2, pre_dim, generator=generator, device=device).requires_grad_() if pre_dim else None
    reads = Reads(rows, scores, pre_input, "gelu" if pre_dim else None)
    before = [whole.clone() for whole in (all_values, all_pre_values) if whole is not None]
    tables = [part.requires_grad_() for part in (values, pre_values) if part is not None]
    with use_backend(backend):
        result = weighted_lookup(reads, *tables)
        result.sum().backward()
    assert result.isfinite().all()
    for leaf in (scores, *tables, *([] if pre_input is None else [pre_input])):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    for table in tables:
        assert table.grad is not None
        assert not table.grad[1:10].any()
    after = [whole for whole in (all_values, all_pre_values) if whole is not None]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.nan_to_num(9), new.nan_to_num(9))


@pytest.mark.parametrize("row", [-1, 11, 2**31, -(2**62)])
def test_other_rows_on_a_cpu(row: int) -> None:
    reads = Reads(torch.tensor([[0, row]]), torch.ones(1, 2, 1))
    with use_backend("naive"), pytest.raises((IndexError, RuntimeError), match="index out of range"):
        weighted_lookup(reads, torch.ones(11, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("where", "number"),
    [("all", math.nan), ("all", math.inf), ("queries", -math.inf), ("keys", 3e38), ("directions", math.nan)],
)
def test_chosen_cells_are_of_the_grid(backend: str, number: float, where: str, generator: torch.Generator) -> None:
    def normal(*shape: int, part: str) -> Tensor:
        made = torch.randn(shape, generator=generator, device=generator.device)
        if where in (part, "all"):
            made.view(-1)[:: 1 if where == "all" else 3] = number
        return made

    with use_backend(backend):
        _, indices = product_key_topk(normal(1, 2, 2, 8, part="queries"), normal(2, 2, 7, 8, part="keys"), 5)
        assert ((indices >= 0) & (indices < 49)).all()
        assert all(len(set(cells)) == 5 for cells in indices.flatten(0, 1).tolist())
        _, indices = tucker_topk(
            normal(1, 2, 2, 8, part="queries"), normal(2, 2, 7, 2, 8, part="keys"), normal(2, 2, 2, 2, part="cores"),
            normal(2, 2, part="directions"), normal(2, 2, part="directions"), 5, 4,
        )  # fmt: skip
        assert ((indices >= 0) & (indices < 49)).all()
        assert all(len(set(cells)) == 5 for cells in indices.flatten(0, 1).tolist())
