"""The lookup's kernels against the definition in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from comparison import assert_near
from ultramem import UltraMemError
from ultramem.layers import ValueTable
from ultramem.ops import SharedTable, use_backend, weighted_lookup
from ultramem.ops.weighted_lookup import fused, naive
from ultramem.ops.weighted_lookup.shared_table import TableState

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("fused")]

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Sizes:
    tokens: int = 3
    k: int = 4
    cores: int = 1
    value_dim: int = 6
    pre_dim: int = 3
    blocks: int = 1
    activation: str | None = None
    rows: int = 11


@dataclass
class Case:
    scores: Tensor
    rows: Tensor
    values: Tensor
    pre_input: Tensor | None
    pre_values: Tensor | None
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Case:
        """The same with gradients of its own; scores stay wide, as retrieval makes them."""

        def leaf(part: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if part is None else part.detach().to(dtype).requires_grad_()

        scores = leaf(self.scores, torch.promote_types(dtype, torch.float32))
        values, pre_input, pre_values = (leaf(part, dtype) for part in (self.values, self.pre_input, self.pre_values))
        assert scores is not None
        assert values is not None
        return Case(scores, self.rows, values, pre_input, pre_values, self.options)

    def run(self, operation: Any = weighted_lookup) -> Tensor:
        self.table = SharedTable(self.values, self.pre_values)
        result: Tensor = operation(self.scores, self.rows, self.table, self.pre_input, **self.options)
        return result

    def gradients(self) -> list[Tensor]:
        parts = (self.scores, self.values, self.pre_input, self.pre_values)
        return [part.grad for part in parts if part is not None and part.grad is not None]


def random_case(generator: torch.Generator, sizes: Sizes) -> Case:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator, device=generator.device)

    def integers(high: int) -> Tensor:
        return torch.randint(high, (s.tokens, s.k), generator=generator, device=generator.device)

    s = sizes
    options = {"pre_activation": s.activation, "blocks": integers(s.blocks) if s.blocks > 1 else None}
    return Case(
        normal(s.tokens, s.k, s.cores),
        integers(s.rows),
        normal(s.rows, s.value_dim),
        normal(s.tokens, s.pre_dim) if s.pre_dim else None,
        normal(s.rows, s.pre_dim) if s.pre_dim else None,
        options | {"num_blocks": s.blocks},
    )


def backward(result: Tensor) -> None:
    """With gradients that are the same in every dtype."""
    places = torch.arange(result.numel(), device=result.device).view_as(result)
    result.backward((torch.sin(places) * 128).round().div(128).to(result.dtype))


def check(case: Case, dtype: torch.dtype) -> None:
    """The kernels do what the definition does in float64 with the same, rounded inputs; gradients too."""
    narrow = case.to(dtype)
    wide = narrow.to(torch.float64)
    expected, found = wide.run(naive.weighted_lookup), narrow.run()
    assert found.dtype == dtype
    assert_near(found, expected, TOLERANCES[dtype])
    backward(expected)
    backward(found)
    assert len(narrow.gradients()) == len(wide.gradients())
    for gradient, wanted in zip(narrow.gradients(), wide.gradients(), strict=True):
        assert_near(gradient, wanted, TOLERANCES[dtype])


SIZES = [
    Sizes(1, 1, value_dim=1, pre_dim=0),
    Sizes(k=3, value_dim=5, pre_dim=0),
    Sizes(k=5, value_dim=7, pre_dim=1, activation="gelu"),
    Sizes(k=9, cores=2, value_dim=10, pre_dim=7, activation="silu"),
    Sizes(k=17, cores=3, value_dim=9, pre_dim=3),
    Sizes(k=6, cores=2, value_dim=6, pre_dim=0, blocks=4),
    Sizes(k=4, cores=2, value_dim=6, pre_dim=5, blocks=4, activation="gelu"),
    Sizes(2, 12, cores=3, value_dim=15, pre_dim=3, blocks=9, activation="silu"),
    Sizes(2, 8, cores=2, value_dim=64, pre_dim=33),
    Sizes(2, 8, cores=1, value_dim=33, pre_dim=64, activation="gelu"),
    Sizes(1, 3, cores=2, value_dim=1030, pre_dim=3),
]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_definition(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> None:
    check(random_case(generator, sizes), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(512, 64, cores=2, value_dim=192, pre_dim=192, activation="gelu", rows=300),
        Sizes(256, 128, cores=2, value_dim=96, pre_dim=0, blocks=4, rows=10_000),
        Sizes(64, 32, value_dim=4096, pre_dim=1024, rows=100),
        Sizes(4000, 16, value_dim=64, pre_dim=64, rows=2),
    ],
    ids=str,
)
def test_equals_the_definition_in_large(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> None:
    check(random_case(generator, sizes), dtype)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, generator: torch.Generator) -> None:
    case = random_case(generator, Sizes(tokens, blocks=4))
    check(case, torch.float32)
    assert case.to(torch.float32).run().shape == (tokens, 24)


def test_blocks_summed_together(generator: torch.Generator) -> None:
    """The number of blocks says nothing where rows are not told their blocks."""
    case = random_case(generator, Sizes())
    case.options["num_blocks"] = 4
    assert case.to(torch.float32).run().shape == (3, 6)
    check(case, torch.float32)


def test_views(generator: torch.Generator) -> None:
    """Nothing needs to be contiguous but the table."""
    sizes = Sizes(3, 3, cores=2, pre_dim=3, blocks=4)
    case, other = random_case(generator, sizes), random_case(generator, sizes)
    transposed = {"blocks": case.options["blocks"].T, "num_blocks": 4, "pre_activation": None}
    table, wide_table = (
        SharedTable(case.values.float(), case.pre_values.float()),
        SharedTable(case.values, case.pre_values),
    )
    inputs = [other.scores.transpose(0, 1), case.pre_input.T, other.scores.new_ones(24, 3).cumsum(1).T]
    wide = [part.clone().requires_grad_() for part in inputs[:2]]
    narrow = [part.float().requires_grad_() for part in inputs[:2]]
    assert not any(part.is_contiguous() for part in (*narrow, inputs[2]))
    expected = naive.weighted_lookup(wide[0], case.rows.T, wide_table, wide[1], **transposed)
    found = weighted_lookup(narrow[0], case.rows.T, table, narrow[1], **transposed)
    assert_near(found, expected, 1e-5)
    expected.backward(inputs[2])
    found.backward(inputs[2].float())
    for part, wanted in zip(narrow, wide, strict=True):
        assert part.grad is not None
        assert wanted.grad is not None
        assert_near(part.grad, wanted.grad, 1e-5)


@pytest.mark.parametrize("which", ["scores", "pre_input", "values", "pre_values"])
def test_each_gradient_alone(which: str, generator: torch.Generator) -> None:
    narrow = random_case(generator, Sizes(activation="silu")).to(torch.float32)
    wide = narrow.to(torch.float64)
    for case in (narrow, wide):
        for name in ("scores", "pre_input", "values", "pre_values"):
            getattr(case, name).requires_grad_(name == which)
    backward(narrow.run())
    backward(wide.run(naive.weighted_lookup))
    ((found,), (expected,)) = narrow.gradients(), wide.gradients()
    assert_near(found, expected, 1e-5)


def results(case: Case) -> list[Tensor]:
    case = case.to(torch.float32)
    result = case.run()
    backward(result)
    return [result, *case.gradients()]


@pytest.mark.parametrize("rows", [1, 11])
def test_the_same_from_run_to_run_whatever_memory_held(
    rows: int, generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    case = random_case(generator, Sizes(9, 7, cores=2, blocks=4, activation="gelu", rows=rows))
    first = results(case)
    request.getfixturevalue("poison")
    for found, again in zip(first, results(case), strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, again)


@pytest.fixture
def table(device: torch.device, generator: torch.Generator) -> ValueTable:
    table = ValueTable(11, 6, 3, device=device)
    for parameter in table.parameters():
        nn.init.normal_(parameter, generator=generator)
    return table


def test_kernels_and_the_definition_in_one_pass(table: ValueTable, generator: torch.Generator) -> None:
    """Lookups of either backend and of other k and cores, several times into the same gradient."""
    wide = [parameter.detach().double().requires_grad_() for parameter in table.parameters()]
    storage = []
    for _ in range(3):
        loss, expected = torch.zeros((), device=generator.device), torch.zeros((), device=generator.device)
        for sizes, backend in ((Sizes(), "fused"), (Sizes(k=7), "naive"), (Sizes(cores=2, blocks=4), "fused")):
            case = random_case(generator, sizes)
            inputs = case.scores.float(), case.rows, table.shared, case.pre_input.float()
            with use_backend(backend):  # type: ignore[arg-type]
                loss = loss + weighted_lookup(*inputs, **case.options).square().sum()
            whole = naive.weighted_lookup(case.scores, case.rows, SharedTable(*wide), case.pre_input, **case.options)
            expected = expected + whole.square().sum()
        loss.backward()
        expected.backward()
        storage.append([parameter.grad.data_ptr() for parameter in table.parameters()])
    for parameter, wanted in zip(table.parameters(), wide, strict=True):
        assert_near(parameter.grad, wanted.grad, 1e-5)
    assert storage[0] == storage[1] == storage[2], "the gradients were made anew"


def look_up(table: ValueTable) -> Tensor:
    device = table.values.device
    scores, pre_input = torch.ones(1, 2, 1, device=device), torch.ones(1, 3, device=device)
    return table.lookup(scores, torch.tensor([[1, 5]], device=device), pre_input)


def expected_under_autocast(table: ValueTable) -> Tensor:
    with torch.no_grad():
        values, pre_values = (parameter[[1, 5]].bfloat16().double() for parameter in table.parameters())
        return (pre_values.sum(1, keepdim=True) * values).sum(0, keepdim=True)


def test_the_copy_for_autocast(table: ValueTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made once for all lookups and backward passes between two changes of the parameters."""
    made = []
    make = TableState._make_copy
    monkeypatch.setattr(TableState, "_make_copy", lambda *arguments: made.append(1) or make(*arguments))

    def check_pass() -> None:
        with torch.autocast(table.values.device.type, torch.bfloat16):
            results = [look_up(table) for _ in range(3)]
        for result in results:
            assert result.dtype == torch.bfloat16
            assert_near(result, expected_under_autocast(table), 1e-2)
        table.zero_grad()
        torch.stack(results).sum().backward()
        assert table.values.grad is not None
        assert table.values.grad.dtype == torch.float32
        with torch.no_grad():
            weight = table.pre_values[5].bfloat16().double().sum()
        assert_near(table.values.grad[5].double(), (3 * weight).expand(6), 1e-2)

    check_pass()
    check_pass()
    assert len(made) == 1
    with torch.no_grad():
        table.values.mul_(-2)
    check_pass()
    assert len(made) == 2
    torch.optim.SGD(table.parameters(), lr=1.0).step()
    check_pass()
    assert len(made) == 3
    table.values.data.mul_(3)  # unseen
    table.pre_values.data.mul_(3)
    table.refresh()
    assert len(made) == 4
    check_pass()
    assert len(made) == 4
    table.load_state_dict({name: parameter + 1 for name, parameter in table.state_dict().items()})
    check_pass()
    assert len(made) == 5


def test_the_copy_serves_lookups_without_pre_values(table: ValueTable) -> None:
    device = table.values.device
    with torch.autocast(device.type, torch.bfloat16):
        for _ in range(2):
            assert_near(look_up(table), expected_under_autocast(table), 1e-2)
            result = table.lookup(torch.ones(1, 1, 1, device=device), torch.tensor([[5]], device=device))
            assert torch.equal(result, table.values[5:6].bfloat16())


def test_no_copy_without_autocast(table: ValueTable) -> None:
    look_up(table).sum().backward()
    table.refresh()
    assert table.shared.state._copy is None


def test_what_is_supported(device: torch.device) -> None:
    def supports(dtype: torch.dtype = torch.float32, value_dim: int = 2, pre_dim: int = 2) -> bool:
        table = SharedTable(*(torch.zeros(3, dim, dtype=dtype, device=device) for dim in (value_dim, pre_dim)))
        return fused.supports(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64), table)

    assert all(supports(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not supports(torch.float64)
    assert supports(value_dim=4096)
    assert not supports(value_dim=4097)
    assert not supports(pre_dim=4097)
    with torch.autocast(device.type, torch.bfloat16):
        assert supports()
        assert not supports(torch.float64)
    with use_backend("auto"):
        assert supports() == (device.type == "cuda")


def test_what_is_not_supported(generator: torch.Generator) -> None:
    case = random_case(generator, Sizes())
    with pytest.raises(UltraMemError, match="weighted_lookup has no fused kernel"):
        case.run()
    with use_backend("auto"):
        assert torch.equal(case.run(), case.run(naive.weighted_lookup))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype: torch.dtype, generator: torch.Generator) -> None:
    case = random_case(generator, Sizes(blocks=4, activation="gelu")).to(dtype)
    table = SharedTable(case.values, case.pre_values)
    tables = (case.values.detach(), case.pre_values.detach())
    arguments = (case.scores, case.rows, case.options["blocks"], *tables, case.pre_input, table.link, table.number)
    torch.library.opcheck(torch.ops.ultramem.weighted_lookup.default, (*arguments, "gelu", 4, dtype))
    result = torch.ops.ultramem.weighted_lookup(*arguments, "gelu", 4, dtype)
    of_gradient = [part.detach() for part in (result, *arguments[:6], table.number)]
    torch.library.opcheck(torch.ops.ultramem.weighted_lookup_backward.default, (*of_gradient, "gelu", False))


def test_without_data(device: torch.device) -> None:
    with FakeTensorMode(), device:
        table = SharedTable(torch.empty(9, 6), torch.empty(9, 3))
        rows = torch.zeros(2, 4, dtype=torch.int64)
        result = weighted_lookup(torch.empty(2, 4, 2), rows, table, torch.empty(2, 3), blocks=rows, num_blocks=5)
        with torch.autocast(device.type, torch.bfloat16):
            narrow = weighted_lookup(torch.empty(2, 4, 2), rows, table, torch.empty(2, 3))
    assert (result.shape, result.dtype) == ((2, 30), torch.float32)
    assert (narrow.shape, narrow.dtype) == ((2, 6), torch.bfloat16)


@pytest.mark.gpu
def test_more_elements_than_32_bits_number(device: torch.device, generator: torch.Generator) -> None:
    """Rows in the first and the last part of a table of 2**31 and some elements."""
    rows, width = 2**24 + 100, 128
    values = torch.zeros(rows, width, device=device, dtype=torch.bfloat16)
    pre_values = torch.zeros(rows, 2, device=device, dtype=torch.bfloat16)
    chosen = torch.tensor([[0, rows - 1, rows - 90], [2**24, rows - 1, 5]], device=device)
    for part in (values, pre_values):
        part[chosen.flatten()] = torch.randn(6, part.shape[1], generator=generator, device=device).bfloat16()[
            [0, 1, 2, 3, 1, 5]
        ]
    unique = chosen.unique()
    small = Case(
        torch.randn(2, 3, 2, generator=generator, device=device),
        torch.searchsorted(unique, chosen),
        values[unique],
        torch.randn(2, 2, generator=generator, device=device),
        pre_values[unique],
        {},
    ).to(torch.bfloat16)
    large = Case(small.scores, chosen, values, small.pre_input, pre_values, {}).to(torch.bfloat16)
    wide = small.to(torch.float64)
    result, expected = large.run(), wide.run(naive.weighted_lookup)
    assert_near(result, expected, 1e-2)
    backward(result)
    backward(expected)
    for part, wanted in ((large.values, wide.values), (large.pre_values, wide.pre_values)):
        assert part.grad is not None
        assert_near(part.grad[unique], wanted.grad, 1e-2)
        assert part.grad.count_nonzero() == part.grad[unique].count_nonzero()
