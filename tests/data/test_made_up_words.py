"""Words against the pattern that they are to have."""

from __future__ import annotations

import re
from random import Random

import pytest

from ultramem.data.made_up_words import made_up_words


@pytest.mark.parametrize("syllables", [2, 3])
def test_words_are_different_and_pronounceable(syllables: int) -> None:
    words = made_up_words(1000, Random(0), syllables)
    assert len({*words}) == 1000
    assert all(re.fullmatch(rf"([bdfgklmnprstvz][aeiou]){{{syllables}}}", word) for word in words)


def test_the_seed_decides() -> None:
    assert made_up_words(50, Random(1)) == made_up_words(50, Random(1))
    assert made_up_words(50, Random(1)) == made_up_words(60, Random(1))[:50]
    assert made_up_words(50, Random(1)) != made_up_words(50, Random(2))
