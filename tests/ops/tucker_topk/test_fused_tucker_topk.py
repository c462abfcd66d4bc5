"""Tucker retrieval's kernels against the definition in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from comparison import assert_near
from ultramem import UltraMemError
from ultramem.ops import use_backend
from ultramem.ops.tucker_topk import fused, naive, tucker_topk

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("fused")]


@dataclass(frozen=True)
class Sizes:
    tokens: int = 2
    heads: int = 1
    rank: int = 2
    cores: int = 2
    keys: int = 20
    key_dim: int = 8
    k: int = 4
    axis_k: int = 4


@dataclass
class Case:
    queries: Tensor
    keys: Tensor
    cores: Tensor
    u: Tensor
    t: Tensor
    k: int
    axis_k: int

    def to(self, dtype: torch.dtype) -> Case:
        """The same with gradients of its own; only queries and keys change their dtype if it is narrow."""
        wide = torch.promote_types(dtype, torch.float32)
        queries, keys = (part.detach().to(dtype).requires_grad_() for part in (self.queries, self.keys))
        cores, u, t = (part.detach().to(wide) for part in (self.cores, self.u, self.t))
        return replace(self, queries=queries, keys=keys, cores=cores.requires_grad_(), u=u, t=t)

    def run(self) -> tuple[Tensor, Tensor]:
        return tucker_topk(self.queries, self.keys, self.cores, self.u, self.t, self.k, self.axis_k)

    def gradients(self) -> list[Tensor | None]:
        return [self.queries.grad, self.keys.grad, self.cores.grad]


def random_case(generator: torch.Generator, sizes: Sizes) -> Case:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator, device=generator.device)

    s = sizes
    keys, cores = normal(s.heads, 2, s.keys, s.rank, s.key_dim), normal(s.cores, s.heads, s.rank, s.rank)
    u, t = normal(s.heads, s.rank), normal(s.heads, s.rank)
    return Case(normal(s.tokens, 2, s.rank, s.key_dim), keys, cores, u, t, s.k, s.axis_k)


def gap(sorted_scores: Tensor, count: int) -> Tensor:
    """By how much the last that is chosen is better than the best that is left out, relative to the scores' size."""
    beyond = sorted_scores[..., count - 1 : count + 1]
    return (beyond[..., 0] - beyond[..., -1]) / sorted_scores.std() if beyond.shape[-1] == 2 else beyond.new_ones(1)


def distinct_case(generator: torch.Generator, sizes: Sizes) -> Case:
    """One in which rounding to float32 changes no choice."""
    while True:
        case = random_case(generator, sizes)
        scores = naive.axis_scores(case.queries, case.keys)
        axes = [torch.einsum("thrn,hr->thn", *axis) for axis in zip(scores, (case.u, case.t), strict=True)]
        gaps = [gap(axis.sort(descending=True).values, case.axis_k) for axis in axes]
        scores, _ = naive.best_cells(scores, case.cores, case.u, case.t, case.axis_k**2, case.axis_k)
        gaps.append(gap(scores.sum(-1), case.k))
        if all((distance > 1e-5).all() for distance in gaps):
            return case


def in_order(scores: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """By index."""
    order = indices.argsort(-1)
    return scores.gather(2, order.unsqueeze(-1).expand_as(scores)), indices.gather(2, order)


def backward(scores: Tensor, indices: Tensor) -> None:
    """With a gradient that depends on token, head, cell and core, not on the cells' order."""
    token, head = (torch.arange(size, device=indices.device) for size in scores.shape[:2])
    phase = indices + 7 * token[:, None, None] + 3 * head[:, None]
    core = torch.arange(1, scores.shape[3] + 1, device=indices.device)
    (scores * torch.sin(phase.unsqueeze(-1) * core)).sum().backward()


def check(case: Case, tolerance: float = 1e-4) -> None:
    """The kernels in float32 do what the definition does in float64, gradients too."""
    wide, narrow = case.to(torch.float64), case.to(torch.float32)
    with use_backend("naive"):
        scores, indices = wide.run()
    fused_scores, fused_indices = narrow.run()
    assert fused_scores.dtype == torch.float32
    expected, expected_indices = in_order(scores, indices)
    found, found_indices = in_order(fused_scores, fused_indices)
    assert torch.equal(found_indices, expected_indices)
    assert_near(found, expected, tolerance)
    backward(scores, indices)
    backward(fused_scores, fused_indices)
    for gradient, wanted in zip(narrow.gradients(), wide.gradients(), strict=True):
        assert_near(gradient, wanted, tolerance)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(1, 1, 1, 1, keys=1, key_dim=1, k=1, axis_k=1),
        Sizes(2, 1, 1, 1, keys=3, key_dim=5, k=1, axis_k=1),
        Sizes(2, 2, 2, 2, keys=3, key_dim=3, k=9, axis_k=3),
        Sizes(1, 3, 2, 2, keys=31, k=4, axis_k=4),
        Sizes(2, 2, 3, 3, keys=32, k=33, axis_k=32),
        Sizes(1, 2, 2, 1, keys=33, k=31, axis_k=7),
        Sizes(2, 2, 3, 2, keys=64, k=64, axis_k=8),
        Sizes(1, 1, 2, 3, keys=100, k=33, axis_k=33),
        Sizes(1, 1, 1, 2, keys=257, k=64, axis_k=40),
        Sizes(2, 1, 2, 1, keys=17, k=200, axis_k=17),
        Sizes(1, 2, 3, 1, keys=128, k=100, axis_k=20),
        Sizes(1, 1, 2, 2, keys=300, k=256, axis_k=100),
        Sizes(2, 1, 4, 1, keys=40, k=5, axis_k=6),
        Sizes(2, 2, 2, 2, keys=1493, k=7, axis_k=7),
        Sizes(7, 1, 2, 2, keys=20, k=4, axis_k=4),
    ],
    ids=str,
)
def test_equals_the_definition(sizes: Sizes, generator: torch.Generator) -> None:
    check(distinct_case(generator, sizes))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(64, 2, 2, 2, keys=1138, key_dim=64, k=32, axis_k=32),
        Sizes(16, 2, 2, 2, keys=1493, key_dim=64, k=128, axis_k=128),
        Sizes(4, 1, 3, 2, keys=8192, key_dim=32, k=256, axis_k=256),
        Sizes(1000, 1, 2, 2, keys=100, key_dim=32, k=16, axis_k=16),
    ],
    ids=str,
)
def test_equals_the_definition_in_large_grids(sizes: Sizes, generator: torch.Generator) -> None:
    """Each token by itself is distinct, all of them together hardly ever: those that are not are left out."""
    case = random_case(generator, sizes)
    with use_backend("naive"):
        expected, indices = in_order(*case.run())
    found, found_indices = in_order(*case.to(torch.float32).run())
    same = (found_indices == indices).all(-1).all(-1)
    assert same.double().mean() > 0.9
    assert_near(found[same], expected[same], 1e-4)
    check(replace(case, queries=case.queries[same.nonzero().flatten()[:1]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes", [Sizes(2, 2, keys=33, k=10, axis_k=33), Sizes(1, 2, 3, 1, keys=50, k=40, axis_k=50)], ids=str
)
def test_narrow_types(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Rounding may choose other cells, hardly worse; each cell's score, and its gradients, are right."""
    case = random_case(generator, sizes).to(dtype)
    scores, indices = case.run()
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert scores.dtype == torch.float32
    assert all(len(set(chosen)) == case.k for chosen in indices.flatten(0, 1).tolist())

    wide = case.to(torch.float64)
    rows, columns = naive.axis_scores(wide.queries, wide.keys)
    chosen = [
        axis.gather(3, index.unsqueeze(2).expand(-1, -1, sizes.rank, -1))
        for axis, index in ((rows, indices // sizes.keys), (columns, indices % sizes.keys))
    ]
    exact = torch.einsum("thrk,chrs,thsk->thkc", chosen[0], wide.cores, chosen[1])
    assert_near(scores, exact, tolerance)
    with use_backend("naive"), torch.no_grad():
        best, _ = wide.run()
    assert_near(scores.sum(-1).sort().values, best.sum(-1).sort().values, 2 * tolerance)
    backward(scores, indices)
    backward(exact, indices)
    for gradient, wanted in zip(case.gradients(), wide.gradients(), strict=True):
        assert gradient is not None
        assert wanted is not None
        assert (gradient.double() - wanted).norm() < tolerance * wanted.norm()


def test_duplicate_keys_and_equal_queries(generator: torch.Generator) -> None:
    """Small integers: scores are exact, many of them equal, and the best of them known whatever is chosen."""

    def integers(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator, device=generator.device).double()

    vector = torch.ones(2, 2, device=generator.device)
    case = Case(integers(2, 2, 2, 3), integers(2, 2, 20, 2, 3), integers(2, 2, 2, 2), vector, vector, 30, 20)
    case.keys[:, :, 10:] = case.keys[:, :, :10]
    scores, indices = case.to(torch.float32).run()
    assert all(len(set(chosen)) == 30 for chosen in indices.flatten(0, 1).tolist())
    with use_backend("naive"):
        best, _ = case.run()
    assert torch.equal(scores.sum(-1).sort().values.double(), best.sum(-1).sort().values)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, generator: torch.Generator) -> None:
    case = distinct_case(generator, Sizes(1, 2, keys=7, k=5, axis_k=3))
    few = replace(case, queries=case.queries[:tokens])
    check(few)
    scores, indices = few.to(torch.float32).run()
    assert scores.shape == (tokens, 2, 5, 2)
    assert indices.shape == (tokens, 2, 5)


def test_views(generator: torch.Generator) -> None:
    """One query for all ranks, and transposed keys, as the layers give them."""
    case = distinct_case(generator, Sizes(keys=9))
    queries = case.queries[:, :, :1].float().requires_grad_()
    keys = case.keys.transpose(3, 4).contiguous().float().requires_grad_()
    cores = case.cores.float()
    leaves = [part.detach().double().requires_grad_() for part in (queries, keys)]
    scores, indices = tucker_topk(
        queries.expand(-1, -1, 2, -1), keys.transpose(3, 4), cores, case.u.float(), case.t.float(), 9, 3
    )
    with use_backend("naive"):
        expected = tucker_topk(
            leaves[0].expand(-1, -1, 2, -1), leaves[1].transpose(3, 4), case.cores, case.u, case.t, 9, 3
        )
    assert torch.equal(in_order(scores, indices)[1], in_order(*expected)[1])
    backward(scores, indices)
    backward(*expected)
    assert_near(queries.grad, leaves[0].grad, 1e-4)
    assert_near(keys.grad, leaves[1].grad, 1e-4)


def results(case: Case) -> list[Tensor | None]:
    case = case.to(torch.float32)
    scores, indices = case.run()
    backward(scores, indices)
    return [scores, indices, *case.gradients()]


def test_the_same_from_run_to_run_whatever_memory_held(
    generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    case = random_case(generator, Sizes(2, 2, 2, 2, keys=40, k=35, axis_k=33))
    first = results(case)
    request.getfixturevalue("poison")
    for found, again in zip(first, results(case), strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, again)


def test_autocast(device: torch.device, generator: torch.Generator) -> None:
    case = random_case(generator, Sizes(keys=9)).to(torch.float32)
    rounded = replace(case.to(torch.bfloat16), cores=case.cores)
    with torch.autocast(device.type, torch.bfloat16):
        scores, indices = case.run()
    expected, expected_indices = rounded.run()
    assert torch.equal(indices, expected_indices)
    assert torch.equal(scores, expected)
    backward(scores, indices)
    assert all(gradient.dtype == torch.float32 for gradient in case.gradients())


def test_what_is_supported(generator: torch.Generator) -> None:
    def supports(dtype: torch.dtype = torch.float32, **sizes: int) -> bool:
        case = random_case(generator, replace(Sizes(key_dim=1), **sizes)).to(dtype)
        return fused.supports(case.queries, case.keys, case.cores, case.u, case.t, case.k, case.axis_k)

    assert all(supports(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not supports(torch.float64)
    assert supports(keys=8192)
    assert not supports(keys=8193)
    assert supports(k=256, axis_k=16)
    assert not supports(k=257, axis_k=17)
    assert not supports(keys=300, axis_k=257)
    assert supports(rank=4)
    assert not supports(rank=5)


def test_what_is_not_supported(generator: torch.Generator) -> None:
    case = distinct_case(generator, Sizes(keys=9))
    with pytest.raises(UltraMemError, match="tucker_topk has no fused kernel"):
        case.run()
    with use_backend("auto"):
        scores, indices = case.run()
    expected, expected_indices = naive.tucker_topk(case.queries, case.keys, case.cores, case.u, case.t, 4, 4)
    assert torch.equal(scores, expected)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype: torch.dtype, generator: torch.Generator) -> None:
    case = random_case(generator, Sizes(1, 2, keys=5, key_dim=4, k=3, axis_k=2)).to(dtype)
    padded = F.pad(case.keys.detach().permute(1, 3, 0, 2, 4), (0, 0, 0, 59)).requires_grad_()
    arguments = (case.queries, padded, case.cores, case.u, case.t, 5, 3, 2)
    torch.library.opcheck(torch.ops.ultramem.tucker_topk.default, arguments)
    scores, _, keys, chosen_scores = torch.ops.ultramem.tucker_topk(*arguments)
    of_gradient = (torch.ones_like(scores), case.queries, padded, case.cores, keys, chosen_scores)
    torch.library.opcheck(torch.ops.ultramem.tucker_topk_backward.default, tuple(part.detach() for part in of_gradient))


def test_without_data(device: torch.device) -> None:
    with FakeTensorMode(), device:
        queries, keys, cores = torch.empty(3, 2, 2, 8), torch.empty(4, 2, 9, 2, 8), torch.empty(5, 4, 2, 2)
        vector = torch.empty(4, 2)
        scores, indices = tucker_topk(queries, keys, cores, vector, vector, 6, 3)
    assert (scores.shape, scores.dtype) == ((3, 4, 6, 5), torch.float32)
    assert (indices.shape, indices.dtype) == ((3, 4, 6), torch.int64)
    narrow = [torch.empty(size, dtype=torch.bfloat16, device="meta") for size in (queries.shape, (2, 2, 4, 64, 8))]
    wide = [torch.empty(size, device="meta") for size in (cores.shape, vector.shape, vector.shape)]
    shapes = [(part.shape, part.dtype) for part in torch.ops.ultramem.tucker_topk(*narrow, *wide, 9, 6, 3)]
    assert shapes == [
        ((3, 4, 6, 5), torch.float32),
        ((3, 4, 6), torch.int64),
        ((3, 4, 2, 6), torch.int32),
        ((3, 4, 2, 2, 6), torch.bfloat16),
    ]
