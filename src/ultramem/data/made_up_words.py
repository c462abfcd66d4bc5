"""Made-up words, so that whatever is known about them was learnt from what we wrote.

Of three syllables hardly any is in use; of two some are, such as `data` and `name`.
"""

from __future__ import annotations

from random import Random

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")


def made_up_words(count: int, random: Random, syllables: int = 3) -> list[str]:
    """Different words such as `zorivu`, lower-case ASCII letters.

    Args:
        count: how many; far fewer than the 70 to the power `syllables` that there are.
        random: what draws them.
        syllables: of each word.
    """
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(random.choices(SYLLABLES, k=syllables))] = None
    return list(words)
