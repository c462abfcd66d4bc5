"""The kernels that sum what all lookups know of a table's gradient, against an addition for each read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ultramem.ops.weighted_lookup import table_gradient
from ultramem.ops.weighted_lookup.reads import Products
from ultramem.ops.weighted_lookup.table_gradient import table_gradients

pytestmark = pytest.mark.kernels

TABLE_ROWS = 9
Tables = list[Tensor | None]


def random_products(
    generator: torch.Generator, rows: Tensor, *, cores: int = 1, value_dim: int = 5, pre_dim: int = 0, blocks: int = 1
) -> Products:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    tokens, k = rows.shape
    block = torch.randint(blocks, rows.shape, generator=generator, device=rows.device) if blocks > 1 else None
    return Products(
        rows,
        block,
        normal(tokens, k, cores),
        normal(tokens, blocks * value_dim),
        normal(tokens, k) if pre_dim else None,
        normal(tokens, pre_dim) if pre_dim else None,
    )


def random_tables(generator: torch.Generator, value_dim: int, pre_dim: int, dtype: torch.dtype) -> Tables:
    widths = [value_dim, pre_dim]
    return [
        torch.zeros(TABLE_ROWS, width, dtype=dtype, device=generator.device, requires_grad=True) if width else None
        for width in widths
    ]


def read_by_read(products: list[Products], value_dim: int, pre_dim: int) -> list[Tensor]:
    """Both gradients in float64."""
    device = products[0].rows.device
    values, pre_values = (
        torch.zeros(TABLE_ROWS, width, dtype=torch.float64, device=device) for width in (value_dim, pre_dim)
    )
    for rows, blocks, weights, gradients, pre_weights, pre_inputs in products:
        tokens, k, cores = weights.shape
        for token in range(tokens):
            for read in range(k):
                block = 0 if blocks is None else int(blocks[token, read])
                gradient = gradients[token, block * value_dim : (block + 1) * value_dim].double()
                weight = weights[token, read].double().repeat_interleave(value_dim // cores)
                values[rows[token, read]] += weight * gradient
                if pre_inputs is not None and pre_weights is not None:
                    pre_values[rows[token, read]] += pre_weights[token, read].double() * pre_inputs[token].double()
    return [values, pre_values]


def check(found: Tables, expected: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for gradient, wanted in zip(found, expected, strict=True):
        if gradient is None:
            assert wanted.numel() == 0
        else:
            assert gradient.dtype == dtype
            torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance)


ROWS_READ = {
    "any": lambda generator: torch.randint(TABLE_ROWS, (6, 4), generator=generator, device=generator.device),
    "one": lambda generator: torch.full((6, 4), 3, device=generator.device),
    "each once": lambda generator: torch.arange(8, device=generator.device).flip(0).view(4, 2),
    "first and last": lambda generator: torch.randint(2, (7, 3), generator=generator, device=generator.device) * 8,
    "mostly one": lambda generator: torch.randint(60, (9, 5), generator=generator, device=generator.device).clamp(
        max=8
    ),
    "a single read": lambda generator: torch.full((1, 1), 8, device=generator.device),
}


@pytest.mark.parametrize("chunk", [4, 8, 16])
@pytest.mark.parametrize("rows", ROWS_READ)
def test_runs_of_reads_across_chunks(
    rows: str, chunk: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_gradient, "_CHUNK", chunk)
    products = [random_products(generator, ROWS_READ[rows](generator), value_dim=3, pre_dim=2)]
    tables = random_tables(generator, 3, 2, torch.float32)
    found = table_gradients(products, tables, [None, None], [None, None])
    check(found, read_by_read(products, 3, 2), torch.float32)
    again = table_gradients(products, tables, [None, None], [None, None])
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("cores", "value_dim", "pre_dim", "blocks"),
    [(1, 1, 0, 1), (1, 5, 7, 4), (2, 6, 1, 1), (3, 9, 3, 9), (2, 64, 33, 1), (3, 33, 64, 4)],
)
def test_widths_cores_and_blocks(
    cores: int, value_dim: int, pre_dim: int, blocks: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    rows = torch.randint(TABLE_ROWS, (5, 3), generator=generator, device=generator.device)
    products = [
        random_products(generator, rows, cores=cores, value_dim=value_dim, pre_dim=pre_dim, blocks=blocks)
        for _ in range(2)
    ]
    tables = random_tables(generator, value_dim, pre_dim, dtype)
    found = table_gradients(products, tables, [None, None], [None, None])
    check(found, read_by_read(products, value_dim, pre_dim), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adds_into_the_buffers(dtype: torch.dtype, generator: torch.Generator) -> None:
    rows = torch.randint(TABLE_ROWS - 1, (5, 3), generator=generator, device=generator.device)
    products = [random_products(generator, rows, value_dim=4, pre_dim=2)]
    tables = random_tables(generator, 4, 2, dtype)
    buffers = [torch.randn(TABLE_ROWS, width, generator=generator, device=rows.device).to(dtype) for width in (4, 2)]
    expected = [
        gradient + buffer.double() for gradient, buffer in zip(read_by_read(products, 4, 2), buffers, strict=True)
    ]
    found = table_gradients(products, tables, [None, None], list(buffers))
    assert all(gradient is buffer for gradient, buffer in zip(found, buffers, strict=True))
    check(found, expected, dtype)


def test_lookups_of_other_shapes_and_sums_of_other_lookups(generator: torch.Generator) -> None:
    """Sums are rounded to a narrow table's dtype once, in the end: 256 + 1 is 256 in bfloat16."""
    device = generator.device
    tables = random_tables(generator, 2, 2, torch.bfloat16)

    def ones(tokens: int, k: int, cores: int) -> Products:
        rows = torch.zeros(tokens, k, dtype=torch.int64, device=device)
        return Products(
            rows,
            None,
            torch.ones(tokens, k, cores, device=device),
            torch.ones(tokens, 2, device=device),
            torch.ones(tokens, k, device=device),
            torch.ones(tokens, 2, device=device),
        )

    products = [ones(2, 3, 1), ones(1, 2, 1), ones(3, 1, 2), ones(2, 2, 1)]  # 15 reads in all
    sums = [torch.full((TABLE_ROWS, 2), 256.0, device=device) for _ in range(2)]
    buffers = [torch.full((TABLE_ROWS, 2), 1.0, device=device, dtype=torch.bfloat16) for _ in range(2)]
    for gradient in table_gradients(products, tables, list(sums), list(buffers)):
        assert gradient is not None
        assert gradient.tolist() == [[272.0] * 2] + [[256.0] * 2] * (TABLE_ROWS - 1)  # 257 is not a bfloat16


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(needed: tuple[bool, bool], generator: torch.Generator) -> None:
    rows = torch.randint(TABLE_ROWS, (3, 4), generator=generator, device=generator.device)
    products = [random_products(generator, rows, value_dim=4, pre_dim=2)]
    tables = random_tables(generator, 4, 2, torch.float32)
    wanted = [table if need else None for table, need in zip(tables, needed, strict=True)]
    found = table_gradients(products, wanted, [None, None], [None, None])
    for gradient, expected, need in zip(found, read_by_read(products, 4, 2), needed, strict=True):
        if need:
            check([gradient], [expected], torch.float32)
        else:
            assert gradient is None


def test_no_reads(generator: torch.Generator) -> None:
    rows = torch.zeros(0, 4, dtype=torch.int64, device=generator.device)
    products = [random_products(generator, rows, value_dim=4, pre_dim=2)]
    buffers = [torch.ones(TABLE_ROWS, 4, device=rows.device), None]
    values, pre_values = table_gradients(products, random_tables(generator, 4, 2, torch.float32), [None, None], buffers)
    assert values is buffers[0]
    assert pre_values is not None
    assert torch.equal(values, torch.ones_like(values))
    assert torch.equal(pre_values, torch.zeros_like(pre_values))
