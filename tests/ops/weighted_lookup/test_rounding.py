"""Stochastic rounding to bfloat16: right on average, of independent bits, and the same bits in kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ultramem.ops.backend import HAS_KERNELS
from ultramem.ops.weighted_lookup.rounding import part_seed, random_bits, round_stochastically

if HAS_KERNELS:
    import triton
    import triton.language as tl

    from ultramem.ops.weighted_lookup import row_step

    @triton.jit
    def round_rows(values, steps, seed, bits, rounded, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
        row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        places, mask = row * WIDTH + columns, columns < WIDTH
        of_row = row_step.random_bits(seed, row, tl.load(steps + row), columns)
        tl.store(bits + places, of_row.to(tl.int64), mask)
        tl.store(rounded + places, row_step.round_stochastically(tl.load(values + places, mask, 0.0), of_row), mask)


SEED = part_seed(0, 0)
ROWS, WIDTH = 2048, 192


def mixed(x: int) -> int:
    """lowbias32 in Python's numbers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def some_bits(step: int = 1, seed: int = SEED) -> Tensor:
    return random_bits(seed, torch.arange(ROWS), torch.full((ROWS,), float(step)), WIDTH)


def any_floats(generator: torch.Generator, *shape: int) -> Tensor:
    """Of all magnitudes, some not finite."""
    device = generator.device
    patterns = torch.randint(-(2**31), 2**31, shape, generator=generator, device=device).to(torch.int32)
    values = patterns.view(torch.float32)
    values[0, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    patterns[1, 0] = 0x7FFFFFFF  # NaN as GPUs make it: one more would be -0
    return values


def test_bits_by_hand() -> None:
    for row, step, column in ((0, 1, 0), (7, 3, 2), (2**31, 2**24 - 1, 4095)):
        of_step = mixed((row * 0x9E3779B9 + SEED) % 2**32) ^ step * 0x9E3779B9 % 2**32
        expected = mixed((mixed(of_step) + column * 0x9E3779B9) % 2**32)
        found = random_bits(SEED, torch.tensor([row]), torch.tensor([float(step)]), column + 1)
        assert found[0, column] == expected


def test_bits_are_uniform_and_independent() -> None:
    """Of neighbours in each direction: within five standard deviations."""
    bits = some_bits()
    others = [bits.roll(1, 0), bits.roll(1, 1), some_bits(2), some_bits(seed=part_seed(0, 1)), some_bits(1, -SEED)]
    for bit in range(32):
        ones = (bits >> bit & 1).double()
        bound = 5 * 0.5 / math.sqrt(ones.numel())
        assert abs(ones.mean() - 0.5) < bound
        for other in others:
            assert abs((ones == (other >> bit & 1)).double().mean() - 0.5) < bound
    counts = (bits >> 16).flatten().bincount(minlength=2**16).double()
    mean = bits.numel() / 2**16
    chi_square = ((counts - mean).square() / mean).sum()
    assert abs(chi_square - 2**16) < 5 * math.sqrt(2 * 2**16)


def test_all_parts_have_seeds_of_their_own() -> None:
    seeds = {part_seed(seed, number) for seed in range(20) for number in range(200)}
    assert len(seeds) == 4000
    assert all(seed % 2 and seed != 1 and -(2**31) <= seed < 2**31 for seed in seeds)  # one kernel for all


def test_a_shard_rounds_as_the_whole() -> None:
    shard = random_bits(part_seed(0, 0, first_row=100), torch.arange(ROWS - 100), torch.ones(ROWS - 100), WIDTH)
    assert torch.equal(shard, some_bits()[100:])


@pytest.mark.parametrize("share", [1 / 65536, 0.01, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("number", [1.0, -1.0, 2.0**97, 0.0])
def test_right_on_average(number: float, share: float) -> None:
    """At a share of the way from a number to the next, away from 0: the mean is right, and so is the variance."""
    pattern = torch.tensor(number).view(torch.int32)
    value, following = ((pattern + more).view(torch.float32) for more in (round(share * 2**16), 2**16))
    ups = round_stochastically(value.expand(ROWS, WIDTH).contiguous(), some_bits()).double()
    unit = following.double() - number
    ups = (ups - number) / unit
    assert set(ups.unique().tolist()) <= {0.0, 1.0}
    share = float((value.double() - number) / unit)
    deviation = math.sqrt(share * (1 - share) / ups.numel())
    assert abs(ups.mean() - share) < 5 * deviation
    assert ups.var(correction=0) == pytest.approx(share * (1 - share), abs=5 * deviation)


def test_numbers_of_bfloat16_stay() -> None:
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    numbers = patterns.view(torch.bfloat16)[None, :]
    rounded = round_stochastically(numbers.float(), torch.full((1, 2**16), 2**32 - 1))
    assert torch.equal(rounded[numbers.isfinite()], numbers[numbers.isfinite()])
    assert torch.equal(rounded.isnan(), numbers.isnan())
    assert torch.equal(rounded.isinf(), numbers.isinf())


def test_what_is_not_finite_stays_so(generator: torch.Generator) -> None:
    values = any_floats(generator, ROWS, WIDTH).cpu()
    rounded = round_stochastically(values, some_bits())
    assert not rounded[~values.isfinite()].isfinite().any()
    inside = values.abs() < torch.finfo(torch.bfloat16).max
    assert rounded[inside].isfinite().all()
    assert ((rounded[inside].float() - values[inside]).abs() <= 2**-7 * values[inside].abs() + 2.0**-133).all()


@pytest.mark.kernels
@pytest.mark.parametrize("width", [1, 33, 192])
def test_kernels_have_the_same_bits(width: int, generator: torch.Generator) -> None:
    rows, device = 50, generator.device
    values = any_floats(generator, rows, max(width, 3))[:, :width].contiguous()
    steps = torch.randint(1, 2**24, (rows,), generator=generator, device=device).float()
    bits = torch.zeros(rows, width, dtype=torch.int64, device=device)
    rounded = torch.zeros(rows, width, dtype=torch.bfloat16, device=device)
    round_rows[(rows,)](values, steps, SEED, bits, rounded, WIDTH=width, BLOCK=max(triton.next_power_of_2(width), 1))
    expected = random_bits(SEED, torch.arange(rows, device=device), steps, width)
    assert torch.equal(bits, expected)
    assert torch.equal(rounded.view(torch.int16), round_stochastically(values, expected).view(torch.int16))
