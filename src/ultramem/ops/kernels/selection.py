"""The k best of some numbers: found by a threshold that k of them reach, then listed. No sorting.

What the numbers are, and how many reach a threshold, is the business of the kernel that searches. What it chooses are
bits of words, a word for one or several columns of cells, so that only the words' counts are summed across threads and
nothing but the result is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Scores are clamped, so that thresholds between any two of them, and products of them, are finite.
LIMIT = tl.constexpr(1e18)


@triton.jit
def finite(x):
    """As float32 within the limits; NaN becomes the largest, as in `torch.topk`."""
    return tl.maximum(tl.minimum(x.to(tl.float32), LIMIT), -LIMIT)


@triton.jit
def to_ordered(x):
    """The integer image of float32 numbers that has their order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(image):
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def distance(low, high):
    """Of the integer images; without a sign, it cannot overflow."""
    return to_ordered(high).to(tl.uint32, bitcast=True) - to_ordered(low).to(tl.uint32, bitcast=True)


@triton.jit
def _logarithm(x):
    """Of a positive number, to within 0.09, in units of 2**-23: its exponent and fraction as they stand."""
    return x.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def next_probe(low, high, count_low, count_high, k, passes, STEP: tl.constexpr):
    """A threshold strictly between `low` and `high`, where the count that reaches it may be k.

    The logarithm of the count is nearly linear in the threshold: interpolation halves the passes of bisection. From
    the twelfth pass on it is bisection of the integer images, which ends for any input.
    """
    log_low, log_k = _logarithm(count_low.to(tl.float32)), _logarithm(k.to(tl.float32))
    log_high = _logarithm(tl.maximum(count_high.to(tl.float32), 0.5))
    share = (log_low - log_k) / tl.maximum(log_low - log_high, 1.0)
    image_low, image_high = to_ordered(low), to_ordered(high)
    if passes < 12:
        image = to_ordered(low + (high - low) * tl.minimum(tl.maximum(share, 0.02), 0.98))
    else:
        image = image_low + (distance(low, high) // 2).to(tl.int32)
    if STEP > 1:
        image = image // STEP * STEP
    return from_ordered(tl.minimum(tl.maximum(image, image_low + STEP), image_high - STEP))


@triton.jit
def find_threshold(count_reaching: tl.constexpr, numbers, low, highest, count_low, k, enough, STEP: tl.constexpr):
    """Raise `low`, which k numbers or more reach, until at most `enough` reach it or it is one of several that tie.

    Args:
        count_reaching: `(probe, *numbers)`, a jitted function: how many numbers reach the probe.
        numbers: what it counts, a tuple.
        low: where to start.
        highest: the largest number.
        count_low: how many numbers reach `low`; a variable, not a constant.
        k: how many numbers to find.
        enough: k or more.
        STEP: distance of the integer images of neighbouring numbers.

    Returns the raised `low`; `high`; how many numbers reach `high`, at most k. If `enough` is k, these are the best,
    and together with any others that reach `low`, which are all equal, the best k.
    """
    high = from_ordered(to_ordered(highest) + STEP)
    count_high = 0
    passes = 0
    while (count_low > enough) & (distance(low, high) > STEP):
        probe = next_probe(low, high, count_low, count_high, k, passes, STEP)
        count = count_reaching(probe, *numbers)
        reached = count >= k
        low, count_low = tl.where(reached, probe, low), tl.where(reached, count, count_low)
        high, count_high = tl.where(reached, high, probe), tl.where(reached, count_high, count)
        passes += 1
    exact = count_low == k
    return low, tl.where(exact, low, high), tl.where(exact, k, count_high)


@triton.jit
def column_bits(chosen, FIRST: tl.constexpr):
    """For each column a word in which bit `FIRST + row` says whether the cell is chosen."""
    rows = FIRST + tl.arange(0, chosen.shape[0])
    return tl.sum(tl.where(chosen, (1 << rows)[:, None], 0), axis=0)


@triton.jit
def _count_bits(words):
    words = words.to(tl.uint32, bitcast=True)
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def write_chosen(words, base, row_stride, first, last, out, ROWS: tl.constexpr):
    """Write the numbers of the cells marked in `words` to places from `first` on, but none to `last` or beyond.

    A word holds `32 // ROWS` columns of `ROWS` cells; the number of a cell is `base + row * row_stride + column`.
    Returns the next place.
    """
    entries = tl.arange(0, words.shape[0])
    counts = _count_bits(words)
    places = first + tl.cumsum(counts) - counts
    while tl.max((words != 0).to(tl.int32)) == 1:
        lowest = (words & -words).to(tl.float32)
        bit = ((lowest.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        number = base + bit % ROWS * row_stride + entries * (32 // ROWS) + bit // ROWS
        tl.store(out + places, number, mask=(words != 0) & (places < last))
        places += 1
        words = words & (words - 1)
    return first + tl.sum(counts)
