"""Product-key retrieval's kernels against the definition in float64."""

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
from ultramem.ops.product_key_topk import fused, naive, product_key_topk

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("fused")]


@dataclass(frozen=True)
class Sizes:
    tokens: int = 2
    heads: int = 1
    keys: int = 20
    key_dim: int = 8
    k: int = 4


def random_inputs(generator: torch.Generator, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Queries and keys in float64."""
    s = sizes
    shapes = (s.tokens, s.heads, 2, s.key_dim), (s.heads, 2, s.keys, s.key_dim)
    queries, keys = (torch.randn(shape, generator=generator, device=generator.device).double() for shape in shapes)
    return queries, keys


def distinct_inputs(generator: torch.Generator, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Those of which rounding to float32 changes no choice."""
    while True:
        queries, keys = random_inputs(generator, sizes)
        best, _ = naive.product_key_topk(queries, keys, min(sizes.k + 1, sizes.keys**2))
        if best.shape[2] == sizes.k or (best[..., -2] - best[..., -1] > 1e-5 * best.abs().max()).all():
            return queries, keys


def leaves(inputs: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    queries, keys = (part.detach().to(dtype).requires_grad_() for part in inputs)
    return queries, keys


def in_order(scores: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """By index."""
    order = indices.argsort(-1)
    return scores.gather(2, order), indices.gather(2, order)


def backward(scores: Tensor, indices: Tensor) -> None:
    """With a gradient that depends on token, head and cell, not on the cells' order."""
    token, head = (torch.arange(size, device=indices.device) for size in scores.shape[:2])
    (scores * torch.sin(indices + 7 * token[:, None, None] + 3.0 * head[:, None])).sum().backward()


def check(inputs: tuple[Tensor, Tensor], k: int, tolerance: float = 1e-4) -> None:
    """The kernels in float32 do what the definition does in float64, gradients too."""
    wide, narrow = leaves(inputs, torch.float64), leaves(inputs, torch.float32)
    expected, found = naive.product_key_topk(*wide, k), product_key_topk(*narrow, k)
    assert found[0].dtype == torch.float32
    assert torch.equal(in_order(*found)[1], in_order(*expected)[1])
    assert_near(in_order(*found)[0], in_order(*expected)[0], tolerance)
    backward(*expected)
    backward(*found)
    for gradient, wanted in zip(narrow, wide, strict=True):
        assert_near(gradient.grad, wanted.grad, tolerance)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(1, 1, keys=1, key_dim=1, k=1),
        Sizes(2, 1, keys=3, key_dim=5, k=1),
        Sizes(2, 2, keys=3, key_dim=3, k=9),
        Sizes(1, 3, keys=31, k=4),
        Sizes(2, 2, keys=32, k=32),
        Sizes(1, 2, keys=33, k=33),
        Sizes(2, 2, keys=64, k=7),
        Sizes(1, 1, keys=100, k=50),
        Sizes(2, 1, keys=17, k=200),
        Sizes(1, 1, keys=20, k=256),
        Sizes(1, 1, keys=257, k=100),
        Sizes(2, 2, keys=1493, k=5),
        Sizes(1, 1, keys=8192, k=3),
        Sizes(7, 1, keys=20, k=4),
    ],
    ids=str,
)
def test_equals_the_definition(sizes: Sizes, generator: torch.Generator) -> None:
    check(distinct_inputs(generator, sizes), sizes.k)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(64, 2, keys=1138, key_dim=64, k=32),
        Sizes(16, 4, keys=1493, key_dim=64, k=128),
        Sizes(4, 1, keys=8192, key_dim=32, k=256),
        Sizes(1000, 1, keys=100, key_dim=32, k=16),
    ],
    ids=str,
)
def test_equals_the_definition_in_large_grids(sizes: Sizes, generator: torch.Generator) -> None:
    """Each token by itself is distinct, all of them together hardly ever: those that are not are left out."""
    queries, keys = random_inputs(generator, sizes)
    expected, indices = in_order(*naive.product_key_topk(queries, keys, sizes.k))
    found, found_indices = in_order(*product_key_topk(queries.float(), keys.float(), sizes.k))
    same = (found_indices == indices).all(-1).all(-1)
    assert same.double().mean() > 0.9
    assert_near(found[same], expected[same], 1e-4)
    check((queries[same.nonzero().flatten()[:1]], keys), sizes.k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [Sizes(2, 2, keys=33, k=10), Sizes(1, 2, keys=100, k=40)], ids=str)
def test_narrow_types(sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Rounding may choose other cells, hardly worse; each cell's score, and its gradients, are right."""
    inputs = leaves(random_inputs(generator, sizes), dtype)
    scores, indices = product_key_topk(*inputs, sizes.k)
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert scores.dtype == torch.float32
    assert all(len(set(chosen)) == sizes.k for chosen in indices.flatten(0, 1).tolist())

    wide = leaves(inputs, torch.float64)
    rows, columns = naive.axis_scores(*wide)
    exact = rows.gather(2, indices // sizes.keys) + columns.gather(2, indices % sizes.keys)
    assert_near(scores, exact, tolerance)
    best, _ = naive.product_key_topk(*wide, sizes.k)
    assert_near(scores.sort().values, best.sort().values, 2 * tolerance)
    backward(scores, indices)
    backward(exact, indices)
    for gradient, wanted in zip(inputs, wide, strict=True):
        assert gradient.grad is not None
        assert wanted.grad is not None
        assert (gradient.grad.double() - wanted.grad).norm() < tolerance * wanted.grad.norm()


def test_duplicate_keys_and_equal_queries(generator: torch.Generator) -> None:
    """Small integers: scores are exact, many of them equal, and the best of them known whatever is chosen."""
    queries = torch.randint(-1, 2, (2, 2, 2, 3), generator=generator, device=generator.device).double()
    keys = torch.randint(-1, 2, (2, 2, 20, 3), generator=generator, device=generator.device).double()
    keys[:, :, 10:] = keys[:, :, :10]
    scores, indices = product_key_topk(queries.float(), keys.float(), 30)
    assert all(len(set(chosen)) == 30 for chosen in indices.flatten(0, 1).tolist())
    best, _ = naive.product_key_topk(queries, keys, 30)
    assert torch.equal(scores.sort(descending=True).values.double(), best)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, generator: torch.Generator) -> None:
    queries, keys = distinct_inputs(generator, Sizes(1, 2, keys=7, k=5))
    check((queries[:tokens], keys), 5)
    scores, indices = product_key_topk(queries[:tokens].float(), keys.float(), 5)
    assert scores.shape == indices.shape == (tokens, 2, 5)


def test_views(generator: torch.Generator) -> None:
    queries, keys = distinct_inputs(generator, Sizes(keys=9))
    one_query, turned = queries[:, :, :1].float().requires_grad_(), keys.mT.contiguous().float().requires_grad_()
    wide_query, wide_turned = (part.detach().double().requires_grad_() for part in (one_query, turned))
    found = product_key_topk(one_query.expand(-1, -1, 2, -1), turned.mT, 81)
    expected = naive.product_key_topk(wide_query.expand(-1, -1, 2, -1), wide_turned.mT, 81)
    assert torch.equal(in_order(*found)[1], in_order(*expected)[1])
    backward(*found)
    backward(*expected)
    assert_near(one_query.grad, wide_query.grad, 1e-4)
    assert_near(turned.grad, wide_turned.grad, 1e-4)


def results(inputs: tuple[Tensor, Tensor], k: int) -> list[Tensor | None]:
    queries, keys = leaves(inputs, torch.float32)
    scores, indices = product_key_topk(queries, keys, k)
    backward(scores, indices)
    return [scores, indices, queries.grad, keys.grad]


def test_the_same_from_run_to_run_whatever_memory_held(
    generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    inputs = random_inputs(generator, Sizes(2, 2, keys=40, k=35))
    first = results(inputs, 35)
    request.getfixturevalue("poison")
    for found, again in zip(first, results(inputs, 35), strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, again)


def test_autocast(device: torch.device, generator: torch.Generator) -> None:
    inputs = leaves(random_inputs(generator, Sizes(keys=9)), torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        scores, indices = product_key_topk(*inputs, 4)
    expected, expected_indices = product_key_topk(*leaves(inputs, torch.bfloat16), 4)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(scores, expected)
    backward(scores, indices)
    assert all(part.grad is not None and part.grad.dtype == torch.float32 for part in inputs)


def test_what_is_supported(generator: torch.Generator) -> None:
    def supports(dtype: torch.dtype = torch.float32, **sizes: int) -> bool:
        chosen = replace(Sizes(key_dim=1), **sizes)
        return fused.supports(*leaves(random_inputs(generator, chosen), dtype), chosen.k)

    assert all(supports(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not supports(torch.float64)
    assert supports(keys=8192)
    assert not supports(keys=8193)
    assert supports(k=256)
    assert not supports(k=257)


def test_what_is_not_supported(generator: torch.Generator) -> None:
    inputs = distinct_inputs(generator, Sizes(keys=9))
    with pytest.raises(UltraMemError, match="product_key_topk has no fused kernel"):
        product_key_topk(*inputs, 4)
    with use_backend("auto"):
        found = product_key_topk(*inputs, 4)
    assert all(torch.equal(*pair) for pair in zip(found, naive.product_key_topk(*inputs, 4), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype: torch.dtype, generator: torch.Generator) -> None:
    queries, keys = leaves(random_inputs(generator, Sizes(1, 2, keys=5, key_dim=4)), dtype)
    padded = F.pad(keys.detach(), (0, 0, 0, 59)).requires_grad_()
    torch.library.opcheck(torch.ops.ultramem.product_key_topk.default, (queries, padded, 5, 3))
    scores, _, chosen = torch.ops.ultramem.product_key_topk(queries, padded, 5, 3)
    arguments = tuple(part.detach() for part in (torch.ones_like(scores), queries, padded, chosen))
    torch.library.opcheck(torch.ops.ultramem.product_key_topk_backward.default, arguments)


def test_without_data(device: torch.device) -> None:
    with FakeTensorMode(), device:
        scores, indices = product_key_topk(torch.empty(3, 4, 2, 8), torch.empty(4, 2, 9, 8), 6)
    assert (scores.shape, scores.dtype) == ((3, 4, 6), torch.float32)
    assert (indices.shape, indices.dtype) == ((3, 4, 6), torch.int64)
    narrow = [torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((3, 4, 2, 8), (4, 2, 64, 8))]
    shapes = [(part.shape, part.dtype) for part in torch.ops.ultramem.product_key_topk(*narrow, 9, 6)]
    assert shapes == [((3, 4, 6), torch.float32), ((3, 4, 6), torch.int64), ((3, 4, 2, 6), torch.int32)]
