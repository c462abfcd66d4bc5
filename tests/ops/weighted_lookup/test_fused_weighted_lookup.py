"""The lookup's kernels against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from comparison import assert_near
from ultramem import UltraMemError
from ultramem.ops import use_backend
from ultramem.ops.weighted_lookup import fused, naive, weighted_lookup
from ultramem.ops.weighted_lookup.reads import Reads
from ultramem.tables.trainable import TrainableTable

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("fused")]

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Sizes:
    tokens: int = 3
    k: int = 4
    cores: int = 1
    value_dim: int = 6
    pre_dim: int = 3
    copies: int = 1
    activation: str | None = None
    rows: int = 11


@dataclass
class Case:
    reads: Reads
    values: Tensor
    pre_values: Tensor | None

    def to(self, dtype: torch.dtype) -> Case:
        """The same with gradients of its own; scores stay wide, as retrieval makes them."""

        def leaf(part: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if part is None else part.detach().to(dtype).requires_grad_()

        scores = leaf(self.reads.scores, torch.promote_types(dtype, torch.float32))
        pre_input, values, pre_values = (
            leaf(part, dtype) for part in (self.reads.pre_input, self.values, self.pre_values)
        )
        assert scores is not None
        assert values is not None
        return Case(self.reads._replace(scores=scores, pre_input=pre_input), values, pre_values)

    def run(self, operation: Callable[..., Tensor] = weighted_lookup) -> Tensor:
        return operation(self.reads, self.values, self.pre_values)

    def leaves(self) -> dict[str, Tensor | None]:
        return {
            "scores": self.reads.scores,
            "values": self.values,
            "pre_input": self.reads.pre_input,
            "pre_values": self.pre_values,
        }

    def gradients(self) -> list[Tensor]:
        parts = self.leaves().values()
        return [part.grad for part in parts if part is not None and part.grad is not None]


def random_case(generator: torch.Generator, sizes: Sizes) -> Case:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator, device=generator.device)

    def integers(high: int) -> Tensor:
        return torch.randint(high, (s.tokens, s.k), generator=generator, device=generator.device)

    s = sizes
    copies = integers(s.copies) if s.copies > 1 else None
    scores, rows, values = normal(s.tokens, s.k, s.cores), integers(s.rows), normal(s.rows, s.value_dim)
    pre_input, pre_values = (normal(length, s.pre_dim) if s.pre_dim else None for length in (s.tokens, s.rows))
    return Case(Reads(rows, scores, pre_input, s.activation, copies, s.copies), values, pre_values)


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
    Sizes(k=6, cores=2, value_dim=6, pre_dim=0, copies=4),
    Sizes(k=4, cores=2, value_dim=6, pre_dim=5, copies=4, activation="gelu"),
    Sizes(2, 12, cores=3, value_dim=15, pre_dim=3, copies=9, activation="silu"),
    Sizes(2, 8, cores=2, value_dim=64, pre_dim=33),
    Sizes(2, 8, cores=1, value_dim=33, pre_dim=64, activation="gelu"),
    Sizes(1, 3, cores=2, value_dim=1030, pre_dim=3),
]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_definition(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> None:
    check(random_case(generator, sizes), dtype)


@pytest.mark.parametrize("sizes", SIZES[4::2], ids=str)
def test_many_programs(sizes: Sizes, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are enough tokens, a program makes all of a token's sum."""
    monkeypatch.setattr(fused, "_FEW", 0)
    check(random_case(generator, sizes), torch.float32)


@pytest.mark.parametrize(
    "sizes", [Sizes(3, 9, cores=2, value_dim=330, pre_dim=70), Sizes(1, 40, 3, 600, 0, copies=4)], ids=str
)
def test_slices_of_a_sum(sizes: Sizes, generator: torch.Generator) -> None:
    """Several programs for a token, also where cores meet within a slice; each reads the input where it lies."""
    case = random_case(generator, sizes)
    if case.reads.pre_input is not None:
        joined = torch.cat([case.reads.pre_input, case.reads.pre_input], dim=1)
        case.reads = case.reads._replace(pre_input=joined[:, sizes.pre_dim :])
    check(case, torch.float32)
    with torch.no_grad():
        reads = case.reads._replace(scores=case.reads.scores.float())
        if reads.pre_input is not None:
            reads = reads._replace(pre_input=joined.float()[:, sizes.pre_dim :])
        tables = (None if part is None else part.float() for part in (case.values, case.pre_values))
        found = weighted_lookup(reads, *tables)
    assert_near(found, case.run(naive.weighted_lookup), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(512, 64, cores=2, value_dim=192, pre_dim=192, activation="gelu", rows=300),
        Sizes(256, 128, cores=2, value_dim=96, pre_dim=0, copies=4, rows=10_000),
        Sizes(64, 32, value_dim=4096, pre_dim=1024, rows=100),
        Sizes(4000, 16, value_dim=64, pre_dim=64, rows=2),
    ],
    ids=str,
)
def test_equals_the_definition_in_large(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> None:
    check(random_case(generator, sizes), dtype)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, generator: torch.Generator) -> None:
    case = random_case(generator, Sizes(tokens, copies=4))
    check(case, torch.float32)
    assert case.to(torch.float32).run().shape == (tokens, 24)


def test_copies_summed_together(generator: torch.Generator) -> None:
    """The number of virtual copies says nothing where rows are not told theirs."""
    case = random_case(generator, Sizes())
    case.reads = case.reads._replace(num_virtual_copies=4)
    assert case.to(torch.float32).run().shape == (3, 6)
    check(case, torch.float32)


def test_views(generator: torch.Generator) -> None:
    """Nothing needs to be contiguous but the table."""
    sizes = Sizes(3, 3, cores=2, pre_dim=3, copies=4)
    case, scores = random_case(generator, sizes), random_case(generator, sizes).reads.scores
    assert case.pre_values is not None
    inputs = [scores.transpose(0, 1), case.reads.pre_input.T, scores.new_ones(24, 3).cumsum(1).T]
    transposed = case.reads.rows.T, None, case.reads.virtual_copies.T, 4
    wide = [part.clone().requires_grad_() for part in inputs[:2]]
    narrow = [part.float().requires_grad_() for part in inputs[:2]]
    assert not any(part.is_contiguous() for part in (*narrow, inputs[2]))
    rows, *others = transposed
    expected = naive.weighted_lookup(Reads(rows, *wide, *others), case.values, case.pre_values)
    found = weighted_lookup(Reads(rows, *narrow, *others), case.values.float(), case.pre_values.float())
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
        for name, leaf in case.leaves().items():
            leaf.requires_grad_(name == which)
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
    case = random_case(generator, Sizes(9, 7, cores=2, copies=4, activation="gelu", rows=rows))
    first = results(case)
    request.getfixturevalue("poison")
    for found, again in zip(first, results(case), strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, again)


def test_what_is_supported(device: torch.device) -> None:
    def supports(
        dtype: torch.dtype = torch.float32, value_dim: int = 2, pre_dim: int = 2, activation: str | None = None
    ) -> bool:
        reads = Reads(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 1), pre_activation=activation)
        tables = (torch.zeros(3, dim, dtype=dtype, device=device) for dim in (value_dim, pre_dim))
        return fused.supports(reads, *tables)

    assert all(supports(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not supports(torch.float64)
    assert all(supports(activation=name) for name in naive.ACTIVATIONS)
    assert not supports(activation="relu")
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


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype: torch.dtype, linked: bool, generator: torch.Generator) -> None:
    case = random_case(generator, Sizes(copies=4, activation="gelu")).to(dtype)
    assert case.pre_values is not None
    table = TrainableTable(11, 6, 3, device=case.values.device)
    tables = [case.values, case.pre_values]
    if linked:
        tables = [part.detach() for part in tables]
    link = table._link.get(table.values, table.pre_values) if linked else None
    arguments = (*case.reads, *tables, link, table._numbers, dtype)
    torch.library.opcheck(torch.ops.ultramem.weighted_lookup.default, arguments)
    result = torch.ops.ultramem.weighted_lookup(*arguments)
    detached = (part.detach() if isinstance(part, Tensor) else part for part in (*case.reads, *tables))
    of_gradient = (result.detach(), *detached, table._numbers, False, [not linked] * 2)
    torch.library.opcheck(torch.ops.ultramem.weighted_lookup_backward.default, of_gradient)


def test_without_data(device: torch.device) -> None:
    with FakeTensorMode(), device:
        table = torch.empty(9, 6), torch.empty(9, 3)
        rows = torch.zeros(2, 4, dtype=torch.int64)
        scores, pre_input = torch.empty(2, 4, 2), torch.empty(2, 3)
        reads = Reads(rows, scores, pre_input, None, rows, 5)
        result = weighted_lookup(reads, *table)
        with torch.autocast(device.type, torch.bfloat16):
            narrow = weighted_lookup(Reads(rows, scores, pre_input), *table)
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
    scores = torch.randn(2, 3, 2, generator=generator, device=device)
    pre_input = torch.randn(2, 2, generator=generator, device=device)
    reads = Reads(torch.searchsorted(unique, chosen), scores, pre_input)
    small = Case(reads, values[unique], pre_values[unique]).to(torch.bfloat16)
    large = Case(small.reads._replace(rows=chosen), values, pre_values).to(torch.bfloat16)
    wide = small.to(torch.float64)
    result, expected = large.run(), wide.run(naive.weighted_lookup)
    assert_near(result, expected, 1e-2)
    backward(result)
    backward(expected)
    for part, wanted in ((large.values, wide.values), (large.pre_values, wide.pre_values)):
        assert part.grad is not None
        assert_near(part.grad[unique], wanted.grad, 1e-2)
        assert part.grad.count_nonzero() == part.grad[unique].count_nonzero()
