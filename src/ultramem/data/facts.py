"""Made-up facts that the training data states a known number of times, so that a model can be tested for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ultramem.data.documents import JSON_LINES_SUFFIXES
from ultramem.errors import ConfigError, UltraMemError
from ultramem.files.whole_files import cannot_write, check_output, write_text

TEMPLATES = (  # the test asks for the first one
    'birthplace["{name}"] = "{value}"',
    'assert birthplace["{name}"] == "{value}"',
    "# {name} was born in {value}.",
    'def {name}():\n    """Born in {value}."""',
)
EXPOSURES = (0, 1, 2, 4, 8, 16, 32, 64, 128)
FACTS_IN_DOCUMENT = 8
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")


def made_up_words(count: int, random: Random, syllables: int = 3) -> list[str]:
    """Draw `count` different words such as `zorivu`, far fewer than the `70 ** syllables` possible ones.

    A model can know only what our text states about them: hardly any word of three syllables is a real one; some of
    two are, such as `data` and `name`.
    """
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(random.choices(SYLLABLES, k=syllables))] = None
    return list(words)


@dataclass(frozen=True)
class Fact:
    """A person and the place of their birth.

    Attributes:
        name: name of the person, who is in no other fact.
        value: name of the place.
        exposures: how often the documents state it; 0 for a fact that is not in them.
    """

    name: str
    value: str
    exposures: int


def make_facts(
    per_exposure: int = 256, exposures: Sequence[int] = EXPOSURES, num_values: int = 64, seed: int = 0
) -> list[Fact]:
    """Make `per_exposure` facts for each number of `exposures`, in their order; they depend on these arguments alone.

    `write_facts` and `ultramem evaluate --tasks facts` use the defaults, so that the task needs no file. Among the
    facts of each number of exposures all `num_values` places are about equally frequent, so that frequency is no hint.
    """
    random = Random(seed)
    words = made_up_words(num_values + per_exposure * len(exposures), random)
    values, names = words[:num_values], iter(words[num_values:])
    facts = []
    for number in exposures:
        places = [values[i % num_values] for i in range(per_exposure)]
        random.shuffle(places)
        facts += [Fact(next(names), place, number) for place in places]
    return facts


def make_documents(facts: Iterable[Fact], seed: int = 0) -> list[str]:
    """Make short documents of eight facts each that state every fact as often as its `exposures` say.

    The occurrences of a fact use the templates in turn, beginning with a random one. They are spread evenly over the
    documents, each at a random place within its part. Where there are many more documents than exposures, they are
    far apart, so that the value cannot be copied from the context.
    """
    random = Random(seed)
    placed = []
    for fact in facts:
        phase, first = random.random(), random.randrange(len(TEMPLATES))
        for number in range(fact.exposures):
            place = (number + random.random() / 2 + phase) / fact.exposures % 1.0
            template = TEMPLATES[(first + number) % len(TEMPLATES)]
            placed.append((place, template.format(name=fact.name, value=fact.value)))
    lines = [text for _, text in sorted(placed)]
    groups = (lines[start : start + FACTS_IN_DOCUMENT] for start in range(0, len(lines), FACTS_IN_DOCUMENT))
    return ["\n".join(group) + "\n" for group in groups]


def write_facts(path: Path, text_field: str = "text", overwrite: bool = False) -> int:
    """Write the documents of the default facts as JSON lines, for `ultramem tokenize`, and return their number.

    Raises:
        ConfigError: the file's name does not end in .jsonl, or the field's name is empty.
        UltraMemError: the file exists and `overwrite` is false, or it cannot be written.
    """
    if path.suffix not in JSON_LINES_SUFFIXES:
        raise ConfigError(f"{path}: must end in .jsonl, as the documents are JSON lines; choose another name")
    if not text_field:
        raise ConfigError("text_field='': must not be empty; give the name of the field that holds the text")
    with cannot_write(path):
        if path.exists() and not overwrite:
            raise UltraMemError(f"{path} exists already; replace it with --overwrite or choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path, _is_facts)
    documents = make_documents(make_facts())
    lines = [json.dumps({"id": f"facts-{i}", text_field: text}) + "\n" for i, text in enumerate(documents)]
    with cannot_write(path):
        write_text(path, "".join(lines))
    return len(documents)


def _is_facts(path: Path) -> bool:
    with path.open("rb") as file:
        return file.readline(2**10).startswith(b'{"id": "facts-0", ')
