"""Steps of the row-wise optimizer in kernels, against its definition."""

from __future__ import annotations

import pytest
import torch
from tests.ops.weighted_lookup.test_table_gradient import ROWS_READ, TABLE_ROWS, random_products, read_by_read
from torch import Tensor

pytest.importorskip("triton")

from ultramem.ops.weighted_lookup import naive, table_gradient
from ultramem.ops.weighted_lookup.reads import Products, RowStep
from ultramem.ops.weighted_lookup.rounding import part_seed
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


def narrow_step(generator: torch.Generator, rows: int, width: int, number: int = 0, *, copy: bool = False) -> RowStep:
    """Of a parameter in bfloat16; with the options of `exact_gradient`."""
    device = generator.device
    parameter = torch.randn(rows, width, generator=generator, device=device).bfloat16()
    zeros = torch.zeros(3, rows, device=device)
    half = torch.zeros(rows, width, dtype=torch.float16, device=device) if copy else None
    return RowStep(parameter, *zeros, half, lr=2.0**-12, beta=0.0, eps=0.0, seed=part_seed(1, number))


def exact_gradient(generator: torch.Generator, rows: int, width: int) -> Tensor:
    """Of ones, up to their sign: with a square as width, and a beta of 0, only the result of a step is rounded."""
    return torch.randint(2, (rows, width), generator=generator, device=generator.device) * 2.0 - 1


def twin(step: RowStep) -> RowStep:
    return RowStep(*(part.clone() if isinstance(part, Tensor) else part for part in step))


def assert_same(found: RowStep, expected: RowStep) -> None:
    for one, other in zip(found[:5], expected[:5], strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("width", [1, 25, 64])
def test_narrow_by_a_gradient_as_by_definition(width: int, generator: torch.Generator) -> None:
    """To the bit, over steps in which some rows are not read."""
    found = narrow_step(generator, 21, width, copy=True)
    expected, begin = twin(found), found.parameter.clone()
    for number in range(3):
        gradient = exact_gradient(generator, 21, width)
        gradient[number::4] = 0
        step_rows(found, gradient)
        naive.step_rows(expected, gradient)
        read = gradient.abs().sum(1) > 0
        assert_same(found._replace(means=found.means * read, copy=found.copy[read]),
                    expected._replace(copy=expected.copy[read]))  # fmt: skip
    assert not torch.equal(found.parameter, begin)


@pytest.mark.parametrize("chunk", [4, 16])
@pytest.mark.parametrize("parts", ["both", "values", "pre-values"])
def test_narrow_by_products_as_by_definition(
    parts: str, chunk: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of several reads, also over the borders of chunks."""
    monkeypatch.setattr(table_gradient, "_CHUNK", chunk)
    rows = torch.randint(TABLE_ROWS, (6, 5), generator=generator, device=generator.device).sort().values
    products = random_products(generator, rows, value_dim=4, pre_dim=9, cores=2)
    # Only the first read of each row has a gradient: of ones.
    seen = {row: place for place, row in reversed([*enumerate(rows.flatten().tolist())])}
    first = torch.zeros(rows.numel(), device=rows.device)
    first[list(seen.values())] = 1
    first = first.view(rows.shape)
    products = products._replace(
        weights=first[..., None].expand(-1, -1, 2).contiguous(),
        gradients=exact_gradient(generator, 6, 4),
        pre_weights=first,
        pre_inputs=exact_gradient(generator, 6, 9),
    )
    steps = [narrow_step(generator, TABLE_ROWS, width, number) for number, width in enumerate((4, 9))]
    wanted = [parts != "pre-values", parts != "values"]
    found = [twin(step) if learns else None for step, learns in zip(steps, wanted, strict=True)]
    assert step_by_products([products], found)
    for step, expected, gradient in zip(found, steps, read_by_read([products], 4, 9), strict=True):
        if step is not None:
            naive.step_rows(expected, gradient.float())
            assert_same(step, expected)
            assert (expected.steps > 0).sum() == len(seen)


def test_narrow_around_the_unrounded_row(generator: torch.Generator) -> None:
    """Each number is next to that in float64, the mean error is 0, and runs are the same to the bit."""
    rows, width = 300, 48
    step = narrow_step(generator, rows, width)._replace(**OPTIONS)
    gradient = torch.randn(rows, width, generator=generator, device=generator.device)
    found, again = twin(step), twin(step)
    (exact, *_), begin = stepped(step, gradient.double()), step.parameter.double()
    step_rows(found, gradient)
    step_rows(again, gradient)
    assert_same(again, found)
    units = torch.exp2(torch.frexp(exact).exponent - 8.0)
    errors = (found.parameter.double() - exact) / units
    assert errors.abs().max() < 1 + 1e-3
    assert abs(errors.mean()) < 5 * 0.5 / errors.numel() ** 0.5
    naive.step_rows(step, gradient)
    # Another order of the sums in float32 tips a number over about once in 2^16.
    assert (step.parameter != found.parameter).double().mean() < 1e-3
    assert not torch.equal(begin, exact)


def test_a_gradient_that_is_not_a_number(generator: torch.Generator) -> None:
    """It steps no row, and shows in the norm, which ends a run."""
    (step,) = random_steps(generator, [6])
    assert step is not None
    before, gradient = step.parameter.clone(), torch.zeros_like(step.parameter)
    gradient[2, 3] = torch.nan
    step_rows(step, gradient)
    assert torch.equal(step.parameter, before)
    assert step.means.isnan().nonzero().flatten().tolist() == [2]
