"""The kernel of a linear map against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from comparison import assert_near
from ultramem import UltraMemError
from ultramem.ops.linear import linear, naive

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("fused")]

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def random(tokens: int, dim: int, width: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(tokens, dim, generator=generator, device=generator.device)
    weight = torch.randn(width, dim, generator=generator, device=generator.device)
    return x.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tokens", [1, 17, 64])
@pytest.mark.parametrize(("dim", "width"), [(1, 1), (7, 35), (128, 16), (300, 70)])
def test_equals_the_definition(
    dim: int, width: int, tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x, weight = random(tokens, dim, width, generator, dtype)
    found = linear(x, weight)
    assert found.dtype == dtype
    assert_near(found, naive.linear(x.double(), weight.double()), TOLERANCES[dtype])


def test_views_and_no_tokens(generator: torch.Generator) -> None:
    x, weight = random(6, 20, 9, generator, torch.float32)
    for view in (x[:, 4:14], x[:, ::2], x[::2, :10], x[:0, :10]):
        torch.testing.assert_close(linear(view, weight[:, :10].contiguous()), view @ weight[:, :10].T)


def test_many_tokens_take_the_definition(generator: torch.Generator) -> None:
    x, weight = random(65, 8, 4, generator, torch.float64)
    assert torch.equal(linear(x, weight), naive.linear(x, weight))
    with pytest.raises(UltraMemError, match="linear has no fused kernel"):
        linear(x[:2], weight)


def test_operator(generator: torch.Generator) -> None:
    torch.library.opcheck(torch.ops.ultramem.linear.default, random(3, 8, 5, generator, torch.float32))
