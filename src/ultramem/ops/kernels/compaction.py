"""From cells that are marked to a dense list of their numbers.

Marks are bits of words, a word for one or several columns of cells, so that only the words' counts are summed across
threads and nothing but the result is written.
"""

from __future__ import annotations

import triton
import triton.language as tl


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

    A word holds `32 // ROWS` columns of `ROWS` cells; the number of a cell is `base + row * row_stride + column`. Only
    the words' counts are summed across threads. Returns the next place.
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
