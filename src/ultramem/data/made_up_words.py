"""Made-up words, about which a model can know only what our text states.

Hardly any word of three syllables is a real one; some of two are, such as `data` and `name`.
"""

from __future__ import annotations

from random import Random

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")


def made_up_words(count: int, random: Random, syllables: int = 3) -> list[str]:
    """Draw different words such as `zorivu`, in lower-case ASCII letters.

    Args:
        count: number of words; far fewer than the `70 ** syllables` possible ones.
        random: random number generator.
        syllables: syllables per word.
    """
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(random.choices(SYLLABLES, k=syllables))] = None
    return list(words)
