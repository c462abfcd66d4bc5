"""The documents of facts, read again by patterns of their own."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from random import Random

import pytest

from ultramem.cli import main
from ultramem.data.documents import find_sources, read_documents
from ultramem.data.facts import made_up_words, make_documents, make_facts, write_facts
from ultramem.errors import ConfigError, UltraMemError

FORMS = {
    "assignment": r'birthplace\["(\w+)"\] = "(\w+)"\n',
    "assertion": r'assert birthplace\["(\w+)"\] == "(\w+)"\n',
    "comment": r"# (\w+) was born in (\w+)\.\n",
    "docstring": r'def (\w+)\(\):\n    """Born in (\w+)\."""\n',
}


Statements = list[tuple[str, str, str]]


def statements(document: str) -> Statements:
    """Form, name and value of each fact of a document, which must consist of nothing else."""
    found, place = [], 0
    while place < len(document):
        matches = ((form, re.compile(pattern).match(document, place)) for form, pattern in FORMS.items())
        ((form, match),) = ((form, match) for form, match in matches if match)
        found.append((form, match[1], match[2]))
        place = match.end()
    return found


@pytest.fixture(scope="module")
def stated(documents: list[str]) -> list[Statements]:
    """The statements of each document."""
    return [statements(document) for document in documents]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The texts that the command writes."""
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    assert write_facts(path) == len(path.read_text().splitlines())
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_exposures(documents: list[str], stated: list[Statements]) -> None:
    counts = Counter((name, value) for document in stated for _, name, value in document)
    assert Counter(counts.values()) == dict.fromkeys((1, 2, 4, 8, 16, 32, 64, 128), 256)
    assert len({name for name, _ in counts}) == len(counts) == 8 * 256
    facts = make_facts()
    assert {(fact.name, fact.value): fact.exposures for fact in facts if fact.exposures} == counts
    unseen = {fact.name for fact in facts if fact.exposures == 0}
    assert len(unseen) == 256
    assert not unseen & {*re.findall(r"\w+", "".join(documents))}


def test_values_tell_nothing() -> None:
    of_exposures: dict[int, Counter[str]] = defaultdict(Counter)
    for fact in make_facts():
        of_exposures[fact.exposures][fact.value] += 1
    values = {*of_exposures[0]}
    assert len(values) == 64
    assert not values & {fact.name for fact in make_facts()}
    for counts in of_exposures.values():
        assert counts == dict.fromkeys(values, 4)


def test_documents_are_short_pieces_of_python(documents: list[str], stated: list[Statements]) -> None:
    assert len(documents) == 255 * 256 / 8
    for document, facts in zip(documents, stated, strict=True):
        assert 200 <= len(document) <= 500
        ast.parse(document)
        assert len({name for _, name, _ in facts}) == 8  # none twice, so none can be copied


def test_occurrences_are_spread_and_of_all_forms(stated: list[Statements]) -> None:
    places, forms = defaultdict(list), defaultdict(Counter)
    for place, document in enumerate(stated):
        for form, name, _ in document:
            places[name].append(place)
            forms[name][form] += 1
    for name, found in places.items():
        share = len(stated) / len(found)
        gaps = [after - before for before, after in zip(found, [*found[1:], found[0] + len(stated)], strict=True)]
        assert share / 2 - 8 <= min(gaps) <= max(gaps) <= share * 3 / 2 + 8
        assert max(forms[name].values()) - min(forms[name][form] for form in FORMS) <= 1
    once = Counter(form for name, counts in forms.items() if len(places[name]) == 1 for form in counts)
    assert min(once[form] for form in FORMS) > 40  # 64 are expected


def test_company_is_random(stated: list[Statements]) -> None:
    together = Counter(
        frozenset(pair) for document in stated for pair in combinations([name for _, name, _ in document], 2)
    )
    assert max(together.values()) < 16  # of up to 128


def test_always_the_same(documents: list[str]) -> None:
    """Checkpoints can be compared across versions only as long as this is so."""
    digest = hashlib.sha256("".join(documents).encode()).hexdigest()
    assert digest == "8368d422360c831ff84e19e2e686acab3f6cf94ab3403c8ae149f67938f4b6b7"


def test_arguments() -> None:
    facts = make_facts(per_exposure=5, exposures=(0, 3), num_values=2, seed=7)
    assert [fact.exposures for fact in facts] == [0] * 5 + [3] * 5
    assert sorted(Counter(fact.value for fact in facts[:5]).values()) == [2, 3]
    assert facts == make_facts(5, (0, 3), 2, 7)
    assert {fact.name for fact in facts}.isdisjoint(fact.name for fact in make_facts(5, (0, 3), 2, 8))
    documents = make_documents(facts, seed=1)
    assert [len(statements(document)) for document in documents] == [8, 7]
    assert documents == make_documents(facts, seed=1) != make_documents(facts, seed=2)
    assert make_documents(facts[:5]) == []


def test_the_file_is_read_as_tokenize_reads_it(tmp_path: Path, documents: list[str]) -> None:
    path = tmp_path / "facts.jsonl"
    write_facts(path, text_field="content")
    read = list(read_documents(find_sources([path]), text_field="content"))
    assert [document.text for document in read] == documents
    assert [document.name for document in read[:2]] == ["facts-0", "facts-1"]
    assert [other.name for other in tmp_path.iterdir()] == ["facts.jsonl"]


def test_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text("mine")
    with pytest.raises(UltraMemError, match=r"facts\.jsonl exists already; replace it with --overwrite"):
        write_facts(path)
    with pytest.raises(UltraMemError, match=r"facts\.jsonl is a file that ultramem did not write; choose another name"):
        write_facts(path, overwrite=True)
    assert path.read_text() == "mine"
    path.write_text("")  # nothing to lose
    write_facts(path, overwrite=True)
    write_facts(path, overwrite=True)
    assert path.read_text().startswith('{"id": "facts-0"')
    with pytest.raises(ConfigError, match=r"facts\.txt: must end in .jsonl, as the documents are JSON lines"):
        write_facts(tmp_path / "facts.txt")
    with pytest.raises(ConfigError, match="text_field=''"):
        write_facts(tmp_path / "other.jsonl", text_field="")
    with pytest.raises(UltraMemError, match=r"other\.jsonl cannot be written \(File exists\)"):
        write_facts(path / "other.jsonl")
    write_facts(tmp_path / "new" / "facts.jsonl")
    assert (tmp_path / "new" / "facts.jsonl").read_text() == path.read_text()


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "facts.jsonl"

    def call(*options: str) -> int:
        monkeypatch.setattr("sys.argv", ["ultramem", "write-facts", str(path), *options])
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0)

    assert call("--text-field", "code") == 0
    assert "8,160 documents written to" in capsys.readouterr().out
    assert {*json.loads(path.read_text().splitlines()[0])} == {"id", "code"}
    assert call() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert call("--overwrite") == 0
    assert {*json.loads(path.read_text().splitlines()[0])} == {"id", "text"}


@pytest.mark.parametrize("syllables", [2, 3])
def test_words_are_different_and_pronounceable(syllables: int) -> None:
    words = made_up_words(1000, Random(0), syllables)
    assert len({*words}) == 1000
    assert all(re.fullmatch(rf"([bdfgklmnprstvz][aeiou]){{{syllables}}}", word) for word in words)


def test_the_seed_decides() -> None:
    assert made_up_words(50, Random(1)) == made_up_words(50, Random(1))
    assert made_up_words(50, Random(1)) == made_up_words(60, Random(1))[:50]
    assert made_up_words(50, Random(1)) != made_up_words(50, Random(2))
