"""Steps of the row-wise optimizer in kernels, against its definition."""

from __future__ import annotations

import pytest
import torch
from tests.ops.weighted_lookup.test_table_gradient import ROWS_READ, TABLE_ROWS, random_products, read_by_read
from torch import Tensor

pytest.importorskip("triton")

from ultramem.ops.weighted_lookup import naive, table_gradient
from ultramem.ops.weighted_lookup.reads import Products, RowStep
from ultramem.ops.weighted_lookup.row_step import step_rows
from ultramem.ops.weighted_lookup.table_gradient import step_by_products

pytestmark = pytest.mark.kernels

OPTIONS = {"lr": 0.02, "beta": 0.9, "eps": 1e-3}


def random_steps(
    generator: torch.Generator, widths: list[int], dtype: torch.dtype = torch.float32, *, copies: bool = False
) -> list[RowStep | None]:
    copy = torch.zeros(TABLE_ROWS, sum(widths), dtype=torch.bfloat16, device=generator.device) if copies else None
    parts = [None] * len(widths) if copy is None else copy.split(widths, dim=1)
    steps: list[RowStep | None] = []
    for width, part in zip(widths, parts, strict=True):
        parameter = torch.randn(TABLE_ROWS, width, generator=generator, device=generator.device).to(dtype)
        squares = torch.rand(TABLE_ROWS, generator=generator, device=generator.device)
        taken = torch.randint(5, (TABLE_ROWS,), generator=generator, device=generator.device).float()
        steps.append(RowStep(parameter, squares * (taken > 0), taken, torch.zeros_like(taken), part, **OPTIONS))
    return [step if width else None for step, width in zip(steps, widths, strict=True)]


def stepped(step: RowStep, gradient: Tensor) -> list[Tensor]:
    """Parameter, squares and steps by the definition, in float64."""
    wide = RowStep(*(tensor.double() for tensor in step[:4]), None, **OPTIONS)
    naive.step_rows(wide, gradient)
    return list(wide[:3])


def check(step: RowStep, expected: list[Tensor], gradient: Tensor) -> None:
    tolerance = 1e-2 if step.parameter.dtype == torch.bfloat16 else 1e-5
    for found, wanted in zip((step.parameter, step.squares, step.steps), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(step.means.double(), gradient.square().mean(1), rtol=1e-4, atol=1e-6)
    if step.copy is not None:
        read = gradient.abs().sum(1) > 0
        torch.testing.assert_close(step.copy.double()[read], expected[0][read], rtol=1e-2, atol=1e-2)
        assert not step.copy[~read].any()


@pytest.mark.parametrize("chunk", [4, 16])
@pytest.mark.parametrize("rows", ROWS_READ)
def test_by_products(rows: str, chunk: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_gradient, "_CHUNK", chunk)
    products = [random_products(generator, ROWS_READ[rows](generator), value_dim=6, pre_dim=3, cores=2)]
    check_products(products, random_steps(generator, [6, 3], copies=chunk == 4), (6, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("value_dim", "pre_dim", "copies"), [(1, 0, 1), (5, 7, 4), (33, 64, 1)])
def test_widths_and_virtual_copies(
    value_dim: int, pre_dim: int, copies: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    rows = torch.randint(TABLE_ROWS, (5, 3), generator=generator, device=generator.device)
    products = [random_products(generator, rows, value_dim=value_dim, pre_dim=pre_dim, blocks=copies) for _ in range(2)]
    check_products(products, random_steps(generator, [value_dim, pre_dim], dtype), (value_dim, pre_dim))


def check_products(products: list[Products], steps: list[RowStep | None], widths: tuple[int, int]) -> None:
    gradients = read_by_read(products, *widths)
    expected = [
        None if step is None else stepped(step, gradient) for step, gradient in zip(steps, gradients, strict=True)
    ]
    assert step_by_products(products, steps)
    for step, wanted, gradient in zip(steps, expected, gradients, strict=True):
        if step is not None and wanted is not None:
            check(step, wanted, gradient)


def test_a_part_that_learns_nothing_stays(generator: torch.Generator) -> None:
    products = [random_products(generator, ROWS_READ["any"](generator), value_dim=3, pre_dim=2)]
    values, pre_values = random_steps(generator, [3, 2])
    check_products(products, [values, None], (3, 2))
    check_products(products, [None, pre_values], (3, 2))


def test_lookups_of_several_shapes_are_left_to_gradients(generator: torch.Generator) -> None:
    rows = torch.zeros(2, 3, dtype=torch.int64, device=generator.device)
    products = [random_products(generator, read) for read in (rows, rows[:, :2])]
    (step,) = random_steps(generator, [5])
    assert step is not None
    before = step.parameter.clone()
    assert not step_by_products(products, [step, None])
    assert torch.equal(step.parameter, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 6, 33])
def test_by_a_gradient(width: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    (step,) = random_steps(generator, [width], dtype, copies=True)
    assert step is not None
    gradient = torch.randn(TABLE_ROWS, width, generator=generator, device=generator.device).to(dtype)
    gradient[1::3] = 0
    expected = stepped(step, gradient.double())
    step_rows(step, gradient)
    check(step, expected, gradient.double())
