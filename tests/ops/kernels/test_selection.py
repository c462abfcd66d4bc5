"""The search for a threshold, by a kernel that does nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from ultramem.ops.kernels.selection import find_threshold

pytestmark = pytest.mark.kernels


@triton.jit
def _count(probe, numbers):
    return tl.sum((numbers >= probe).to(tl.int32))


@triton.jit(do_not_specialize=["k", "enough"])
def _search(numbers, found, counts, k, enough, SIZE: tl.constexpr, STEP: tl.constexpr):  # noqa: N803
    x = tl.load(numbers + tl.arange(0, SIZE)).to(tl.float32)
    count = SIZE
    low, high, count_high = find_threshold(_count, (x,), tl.min(x), tl.max(x), count, k, enough, STEP)
    tl.store(found, low)
    tl.store(found + 1, high)
    tl.store(counts, count_high)


def search(numbers: Tensor, k: int, enough: int) -> tuple[float, float, int]:
    """Lower and upper bound, and how many numbers reach the upper one."""
    found = torch.empty(2, device=numbers.device)
    count = torch.empty(1, dtype=torch.int32, device=numbers.device)
    step = 1 << 16 if numbers.dtype == torch.bfloat16 else 1
    _search[(1,)](numbers, found, count, k, enough, SIZE=numbers.numel(), STEP=step)
    return *found.tolist(), int(count)


def check(numbers: Tensor, k: int) -> None:
    """The best k are all that reach the upper bound and, of equal ones, some that reach the lower one."""
    low, high, count = search(numbers, k, k)
    wide = numbers.float()
    reach_low, reach_high = wide >= low, wide >= high
    assert count == reach_high.sum() <= k <= reach_low.sum()
    assert len(set(wide[reach_low & ~reach_high].tolist())) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 31, 63, 64])
def test_different_numbers(k: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    check(torch.randn(64, generator=generator, device=generator.device).to(dtype), k)


@pytest.mark.parametrize("k", [1, 20, 64])
def test_ties(k: int, generator: torch.Generator) -> None:
    check(torch.randint(-1, 2, (64,), generator=generator, device=generator.device).float(), k)
    check(torch.zeros(64, device=generator.device), k)


@pytest.mark.parametrize("start", [0.0, 1.0, -1.0, 1e18, -1e-30])
def test_neighbours_in_float32(start: float, device: torch.device) -> None:
    """Numbers that differ in their last bits only, and of either sign around 0."""
    image = torch.tensor(start, device=device).view(torch.int32) + torch.arange(32, dtype=torch.int32, device=device)
    numbers = image.view(torch.float32)
    check(numbers.sort().values, 5)
    check(torch.cat([numbers, -numbers]), 40)


def test_an_upper_bound_of_the_count_is_enough(generator: torch.Generator) -> None:
    numbers = torch.randn(256, generator=generator, device=generator.device)
    low, _, _ = search(numbers, 32, 36)
    assert 32 <= (numbers >= low).sum() <= 36
