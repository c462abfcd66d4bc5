"""Whole runs of `ultramem tokenize`: what OLMo-core reads of them, and how they end when they cannot go on."""

from __future__ import annotations

import gzip
import json
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from ultramem import cli
from ultramem.data import tokenize as tokenize_module
from ultramem.data.documents import BrokenRecordError
from ultramem.data.token_files import Manifest, load_manifest
from ultramem.data.tokenize import TokenizeConfig, tokenize
from ultramem.data.tokenizers import train_bpe
from ultramem.errors import ConfigError, UltraMemError


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct texts of a few dozen made-up words."""
    choose = random.Random(seed)
    words = ["".join(choose.choices("abcdefgäß", k=5)) for _ in range(200)]
    return [f"{number}: " + " ".join(choose.choices(words, k=30)) for number in range(count)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """300 documents in three files of three kinds, and a tokenizer beside them."""
    texts = make_texts(300)
    directory = tmp_path / "corpus"
    directory.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (directory / "a.jsonl").write_text("".join(lines[:100]))
    (directory / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[100:299]).encode()))
    (directory / "c.txt").write_text(texts[299], encoding="utf-8")
    train_bpe(texts, 400).tokenizer.save(str(tmp_path / "tokenizer.json"))
    return directory


def config(corpus: Path, output: str = "tokens", **options: Any) -> TokenizeConfig:
    if "train_bpe" not in options:
        options.setdefault("tokenizer", str(corpus.parent / "tokenizer.json"))
    return TokenizeConfig(sources=(corpus,), output=corpus.parent / output, **options)


def content(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def documents(manifest: Manifest, split: str) -> list[str]:
    """Texts of a split, read without the code under test."""
    tokenizer = Tokenizer.from_file(str(manifest.tokenizer_path))
    texts = []
    for path in manifest.split(split).paths:
        tokens = np.fromfile(path, dtype=f"<{np.dtype(manifest.dtype).str[1:]}")
        with gzip.open(path.with_suffix(".csv.gz"), "rt", encoding="utf-8") as table:
            for row in table:
                start, end = map(int, row.split(",")[:2])
                assert tokens[end - 1] == manifest.eos_token_id
                texts.append(tokenizer.decode(tokens[start : end - 1].tolist(), skip_special_tokens=False))
    return texts


def test_every_document_is_written_once_in_order(corpus: Path) -> None:
    manifest = tokenize(config(corpus, heldout=0.1, shard_tokens=5000))
    texts = make_texts(300)
    train, heldout = documents(manifest, "train"), documents(manifest, "heldout")
    assert sorted(train + heldout) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]
    for name, kept in (("train", train), ("heldout", heldout)):
        split = manifest.split(name)
        assert split.documents == len(kept)
        assert split.bytes == sum(len(text.encode()) for text in kept)
        assert split.tokens == sum(path.stat().st_size // 2 for path in split.paths)
    assert len(manifest.split("train").files) > 2
    assert all(file.tokens <= 5000 for file in manifest.split("train").files)
    assert [file.path.name for file in manifest.split("train").files][:2] == ["part-00000.npy", "part-00001.npy"]
    assert manifest.sources["files"] == 3
    written = content(manifest.directory)
    checksums = json.loads(written.pop("checksums.json"))["files"]
    assert checksums == {name: [[len(text), f"{zlib.crc32(text):08x}"]] for name, text in written.items()}


def test_olmo_core_reads_the_files(corpus: Path) -> None:
    pytest.importorskip("olmo_core")
    from olmo_core.data.utils import iter_document_indices, load_array_slice

    manifest = tokenize(config(corpus))
    tokenizer = Tokenizer.from_file(str(manifest.tokenizer_path))
    (file,) = manifest.split("train").files
    by_table = list(iter_document_indices(file.path, dtype=np.uint16))
    by_tokens = list(
        iter_document_indices(file.path, eos_token_id=manifest.eos_token_id, dtype=np.uint16, use_array_if_local=True)
    )
    assert by_table == by_tokens
    assert (len(by_table), by_table[-1][1]) == (file.documents, file.tokens)
    first = load_array_slice(file.path, *by_table[0], np.uint16)
    assert tokenizer.decode(first[:-1].tolist()) == make_texts(1)[0]


def test_olmo_core_loads_them_as_a_dataset(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("olmo_core")
    from olmo_core.data import NumpyFSLDatasetConfig, TokenizerConfig

    manifest = tokenize(config(corpus, shard_tokens=5000))
    split = manifest.split("train")
    dataset = NumpyFSLDatasetConfig(
        paths=[str(path) for path in split.paths],
        sequence_length=64,
        tokenizer=TokenizerConfig(
            vocab_size=manifest.vocab_size,
            eos_token_id=manifest.eos_token_id,
            pad_token_id=manifest.pad_token_id,
        ),
        work_dir=str(tmp_path),
    ).build()
    dataset.prepare()
    assert len(dataset) == sum(file.tokens // 64 for file in split.files)
    assert dataset[0]["input_ids"].tolist() == np.fromfile(split.paths[0], dtype="<u2")[:64].tolist()


def test_the_same_bytes_whatever_the_process_count(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultramem.data.worker_processes.CHUNK_BYTES", 1000)  # many more chunks than may wait at a time
    options: dict[str, Any] = {"train_bpe": 300, "heldout": 0.1, "shard_tokens": 5000}
    for processes in (1, 2):
        tokenize(config(corpus, f"tokens{processes}", processes=processes, **options))
    one, two = content(corpus.parent / "tokens1"), content(corpus.parent / "tokens2")
    assert one == two
    assert len(one) > 8


def test_heldout_depends_on_seed_and_text_only(corpus: Path) -> None:
    first = set(documents(tokenize(config(corpus, "first", heldout=0.2)), "heldout"))
    assert abs(len(first) - 60) < 4 * (300 * 0.2 * 0.8) ** 0.5  # four standard deviations
    other = set(documents(tokenize(config(corpus, "other", heldout=0.2, seed=1)), "heldout"))
    assert first != other
    (corpus / "a.jsonl").rename(corpus / "z.jsonl")  # another order and other names
    lines = (corpus / "z.jsonl").read_text().splitlines(keepends=True)
    (corpus / "z.jsonl").write_text("".join(lines[::-1] + lines))  # and copies
    again = documents(tokenize(config(corpus, "again", heldout=0.2)), "heldout")
    assert set(again) == first
    assert len(again) > len(first)


def test_nothing_held_out(corpus: Path) -> None:
    manifest = tokenize(config(corpus, heldout=0))
    assert manifest.split("train").documents == 300
    assert not (manifest.directory / "heldout").exists()
    with pytest.raises(UltraMemError, match="--heldout"):
        manifest.split("heldout")


def test_a_bpe_learns_from_training_documents_only(corpus: Path) -> None:
    manifest = tokenize(config(corpus, train_bpe=300, heldout=0.3))
    expected = train_bpe(documents(manifest, "train"), 300).tokenizer
    assert json.loads(manifest.tokenizer_path.read_text()) == json.loads(expected.to_str())
    assert (manifest.vocab_size, manifest.eos_token_id, manifest.pad_token_id) == (300, 0, 1)


def test_a_bpe_learns_from_a_capped_sample(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples: list[list[str]] = []
    monkeypatch.setattr(tokenize_module, "BPE_SAMPLE_BYTES", 10_000)
    monkeypatch.setattr(
        tokenize_module, "call_in_process", lambda train, texts, size: samples.append(texts) or train(texts, size)
    )
    for seed in (0, 0, 1):
        tokenize(config(corpus, train_bpe=300, seed=seed, overwrite=True))
    sizes = [sum(len(text.encode()) for text in sample) for sample in samples]
    assert all(9_000 < size <= 10_000 for size in sizes)
    assert samples[0] == samples[1]
    assert set(samples[0]) != set(samples[2])
    assert len(set(samples[0]) & set(make_texts(100))) < len(samples[0]) / 2, "not just the first file"


def test_a_text_that_spells_the_end_token_does_not_end(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("one<|endoftext|>two<|padding|>")
    manifest = tokenize(config(corpus, train_bpe=300, heldout=0))
    tokens = np.fromfile(manifest.split("train").paths[0], dtype="<u2")
    assert (tokens < 2).sum() == 1
    assert documents(manifest, "train") == ["one<|endoftext|>two<|padding|>"]


def test_max_size(corpus: Path) -> None:
    texts = make_texts(300)
    limit = sum(len(text.encode()) for text in texts[:120]) + 5
    manifest = tokenize(config(corpus, max_size=limit, heldout=0))
    assert documents(manifest, "train") == texts[:120]
    with pytest.raises(UltraMemError, match=r"no document is left for training.*--max-size"):
        tokenize(config(corpus, "none", max_size=5))


def test_broken_records_stop_or_are_skipped(corpus: Path) -> None:
    lines = (corpus / "a.jsonl").read_text().splitlines(keepends=True)
    lines[6], lines[9] = "{broken\n", '{"body": "b"}\n'
    (corpus / "a.jsonl").write_text("".join(lines))
    for options in ({}, {"train_bpe": 300}, {"processes": 2}):
        with pytest.raises(BrokenRecordError, match=r"a.jsonl:7: not valid JSON.*--on-error skip"):
            tokenize(config(corpus, **options))
    assert sorted(path.name for path in corpus.parent.iterdir()) == ["corpus", "tokenizer.json"]
    manifest = tokenize(config(corpus, on_error="skip", heldout=0, train_bpe=300))
    assert manifest.split("train").documents == 298
    assert manifest.skipped == 2
    assert "a.jsonl:10: has no field 'text' (fields: 'body')" in manifest.skipped_examples[1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tokenizer": None}, "tokenizer"),
        ({"train_bpe": 300, "tokenizer": "a"}, "either"),
        ({"train_bpe": 257}, "train_bpe=257: .* 258"),
        ({"train_bpe": 10**11}, "train_bpe=100000000000: must be at most 4194304"),
        ({"train_bpe": 300, "eos_id": 3}, "eos_id"),
        ({"eos_token": "a", "eos_id": 3}, "eos_id=3: must not be given with eos_token='a'"),
        ({"heldout": 1.0}, "heldout=1.0: must be"),
        ({"heldout": -0.1}, "heldout=-0.1: must be"),
        ({"heldout": float("nan")}, "heldout=nan: must be"),
        ({"seed": -1}, "seed=-1: must be"),
        ({"processes": 10**9}, "processes=1000000000: must be at least 1 and at most 1024"),
        ({"processes": 0}, "processes=0: must be at least 1"),
        ({"shard_tokens": 0}, "shard_tokens=0: must be"),
        ({"max_size": 0}, "max_size=0: must be"),
        ({"on_error": "ignore"}, "on_error='ignore': must be one of stop, skip"),
    ],
)
def test_bad_configuration(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config(tmp_path, **options)


def test_options_without_a_source_of_their_kind(corpus: Path) -> None:
    (corpus / "c.txt").unlink()
    with pytest.raises(ConfigError, match=r"separator='---': applies to .txt files, and there is none; leave it out"):
        tokenize(config(corpus, separator="---"))
    files = replace(config(corpus, include=("*.py", "*.md")), sources=(corpus / "a.jsonl",))
    with pytest.raises(ConfigError, match=r"include=\*.py, \*.md: applies to directories, and none is given; leave"):
        tokenize(files)
    assert not (corpus.parent / "tokens").exists()


def test_names_with_line_breaks_and_commas_keep_the_table_readable(tmp_path: Path) -> None:
    pytest.importorskip("olmo_core")
    from olmo_core.data.utils import get_document_indices

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / 'a\nb\r,"c".txt').write_text("one")
    (corpus / "d.jsonl").write_text('{"text": "two", "id": "1\\n2,3"}\n')
    manifest = tokenize(config(corpus, train_bpe=300, heldout=0))
    assert len(get_document_indices(manifest.split("train").paths[0])) == 2


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit status of `ultramem tokenize ARGUMENTS` run in this process."""
    monkeypatch.setattr(sys, "argv", ["ultramem", "tokenize", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_command(corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = corpus.parent / "tokens"
    (corpus / "0.txt").touch()
    arguments = (corpus, "-o", output, "--train-bpe", 300, "--max-size", "20kB", "--exclude", "b.*")
    assert run_command(monkeypatch, *arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert run_command(monkeypatch, *arguments, "--on-error", "skip") == 0
    printed = capsys.readouterr()
    assert printed.err == "", "no progress display where there is no terminal"
    manifest = load_manifest(output)
    assert f"{manifest.split('train').tokens:,}" in printed.out
    assert "skipped records: 1" in printed.out
    assert manifest.split("train").bytes <= 20_000
    assert run_command(monkeypatch, *arguments) == 1
    assert "--overwrite" in capsys.readouterr().err


START = "import sys; from ultramem.cli import main; sys.argv[0] = 'ultramem'; main()"


def start_command(corpus: Path, prepare: Callable[[], None] | None = None, *options: str) -> subprocess.Popen[str]:
    """`ultramem tokenize` in a process group of its own, as in a terminal."""

    def set_up() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells have it ignored by what they start in the background
        if prepare is not None:
            prepare()

    command = [sys.executable, "-c", START, "tokenize", str(corpus), "-o", str(corpus.parent / "tokens"), *options]
    return subprocess.Popen(
        [*command, "--tokenizer", str(corpus.parent / "tokenizer.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=set_up,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_and_can_be_rerun(corpus: Path, number: signal.Signals) -> None:
    for copy in range(10):
        lines = [json.dumps({"text": f"{copy} {text} " * 60}) + "\n" for text in make_texts(200, copy)]
        (corpus / f"more{copy}.jsonl").write_text("".join(lines))
    endless = corpus.parent / "endless.txt"  # or the run could be done before the signal comes
    with endless.open("wb") as file:
        file.truncate(2**36)
    run = start_command(corpus, None, "--processes", "2", str(endless))
    started = corpus.parent / "tokens.partial" / "new" / "train" / "part-00000.npy"
    while not started.exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)  # ends when the workers too have closed their standard error
    assert (run.returncode, out) == (130, "")
    assert err == f"error: interrupted: {corpus.parent / 'tokens'} was not written; run the same command again\n"
    assert sorted(path.name for path in corpus.parent.iterdir()) == ["corpus", "endless.txt", "tokenizer.json"]


def test_a_full_disk_is_one_clear_line(corpus: Path) -> None:
    def limit_file_size() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    out, err = start_command(corpus, limit_file_size).communicate(timeout=60)
    assert out == ""
    assert err.startswith(f"error: {corpus.parent / 'tokens'} cannot be written (File too large) and ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in corpus.parent.iterdir()) == ["corpus", "tokenizer.json"]
