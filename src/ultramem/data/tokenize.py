"""`ultramem tokenize`: reads documents, writes token files and a manifest."""

from __future__ import annotations

import heapq
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

from ultramem.configuration.field_types import check_field, check_range, check_types
from ultramem.data.documents import BrokenRecordError, Document, check_include, find_sources, read_documents
from ultramem.data.near_duplicates import near_duplicates
from ultramem.data.token_files import (
    TOKEN_DIRECTORY,
    TOKENIZER_NAME,
    Manifest,
    SplitWriter,
    load_manifest,
    save_manifest,
)
from ultramem.data.tokenizers import SMALLEST_BPE, ChosenTokenizer, Encoder, load_tokenizer, train_bpe
from ultramem.data.worker_processes import call_in_process, map_documents
from ultramem.errors import ConfigError, UltraMemError
from ultramem.files.directories import partial_directory

BPE_SAMPLE_BYTES = 32 * 2**20  # a larger sample takes more time and memory, but hardly changes the vocabulary
SKIPPED_EXAMPLES = 10
# Arguments that have a field of their own in the manifest, or do not change the result.
NOT_ARGUMENTS = {"sources", "output", "tokenizer", "seed", "processes", "overwrite"}


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """What to tokenize, how, and where to write it.

    Attributes:
        sources: files and directories; see `find_sources`.
        output: directory to write. It appears only when complete.
        tokenizer: name or file, see `load_tokenizer`. Either this or `train_bpe` is required.
        train_bpe: vocabulary size of a byte-level BPE to train on the documents that are not held out, or on a seeded
            sample of 32 MiB if they are larger.
        eos_token, eos_id, pad_token: override the special tokens in the tokenizer's files.
        text_field: field of JSON records or column of parquet files that holds the text.
        separator: separator between documents in `.txt` files.
        include, exclude: shell patterns of files in directories; see `find_sources`.
        heldout: share of the documents held out for evaluation, from 0 to below 1. They are chosen by seed and text,
            so that copies of a document are in the same split.
        seed: seed for the choice of held-out documents and the BPE's sample. Documents keep their order.
        processes: number of processes; does not change the result.
        shard_tokens: maximum number of tokens per token file.
        max_size: maximum number of bytes of text; reading ends before the document that would exceed it.
        near_duplicates: leave out documents at least this similar to an earlier one, above 0 and at most 1; see
            `ultramem.data.near_duplicates`. By default all are kept.
        on_error: what to do with a broken record: `stop`, or `skip` and count it.
        overwrite: whether to replace a finished `output`.

    Raises:
        ConfigError: a value is invalid.
    """

    sources: tuple[Path, ...]
    output: Path
    tokenizer: str | None = None
    train_bpe: int | None = None
    eos_token: str | None = None
    eos_id: int | None = None
    pad_token: str | None = None
    text_field: str = "text"
    separator: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    heldout: float = 0.02
    seed: int = 0
    processes: int = 1
    shard_tokens: int = 2**28
    max_size: int | None = None
    near_duplicates: float | None = None
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if not self.sources:
            raise ConfigError("sources=[]: must not be empty; give at least one file or directory")
        if (self.tokenizer is None) == (self.train_bpe is None):
            raise ConfigError("give either tokenizer (--tokenizer NAME_OR_FILE) or train_bpe (--train-bpe SIZE)")
        if self.train_bpe is not None:
            what = f"at least {SMALLEST_BPE}, for bytes and special tokens"
            check_field(self, "train_bpe", self.train_bpe >= SMALLEST_BPE, what)
            if (self.eos_token, self.eos_id, self.pad_token) != (None, None, None):
                raise ConfigError(
                    f"train_bpe={self.train_bpe}: sets eos_token, eos_id and pad_token itself; leave them out"
                )
        if self.eos_token is not None and self.eos_id is not None:
            raise ConfigError(f"eos_id={self.eos_id}: must not be given with eos_token={self.eos_token!r}")
        check_range(self, "train_bpe", most=2**22)
        check_range(self, "heldout", least=0, below=1)
        check_range(self, "near_duplicates", above=0, most=1)
        check_range(self, "seed", least=0)
        check_range(self, "processes", least=1, most=1024)
        check_range(self, "shard_tokens", "max_size", least=1)


class Corpus:
    """The documents of a run, in order; can be read several times, and counts what the last reading took."""

    def __init__(self, config: TokenizeConfig) -> None:
        self.config = config
        check_include(config.sources, config.include)
        self.files = find_sources(config.sources, config.include, config.exclude)
        if config.separator is not None and not any(file.suffix == ".txt" for file in self.files):
            raise ConfigError(f"separator={config.separator!r}: applies to .txt files, and there is none; leave it out")
        self.size_on_disk = sum(file.num_bytes for file in self.files)
        self.left_out: set[int] = set()  # near-duplicates, by their number among all documents
        self.text_bytes = self.position = self.skipped = 0
        self.skipped_examples: list[str] = []

    def __iter__(self) -> Iterator[Document]:
        self.text_bytes = self.position = self.skipped = 0
        self.skipped_examples.clear()
        limit, number = self.config.max_size, -1
        for record in read_documents(self.files, self.config.text_field, self.config.separator):
            if isinstance(record, BrokenRecordError):
                if self.config.on_error == "stop":
                    raise BrokenRecordError(f"{record}; fix it, or leave out broken records with --on-error skip")
                self.skipped += 1
                if self.skipped <= SKIPPED_EXAMPLES:
                    self.skipped_examples.append(str(record))
                continue
            if limit is not None and self.text_bytes + record.num_bytes > limit:
                return
            self.text_bytes += record.num_bytes
            self.position = record.position
            number += 1
            if number not in self.left_out:
                yield record

    @property
    def completed(self) -> int:
        """Bytes of `size_on_disk` that have been read; all of them once `max_size` is reached."""
        if self.config.max_size is None:
            return self.position
        return max(self.position, self.size_on_disk * self.text_bytes // self.config.max_size)

    def is_heldout(self, document: Document) -> bool:
        """Whether the document is held out."""
        return draw(document, self.config.seed) < self.config.heldout


def draw(document: Document, seed: int) -> float:
    """A uniformly distributed number in [0, 1) that depends on the seed and the text alone."""
    key = blake2b(str(seed).encode()).digest()
    return int.from_bytes(blake2b(document.digest, digest_size=6, key=key).digest()) / 2**48


def tokenize(config: TokenizeConfig) -> Manifest:
    """Tokenize as `config` says, and return the manifest of what was written.

    Files are written to `OUTPUT.partial`, which is renamed to `OUTPUT` at the end, and removed if the run fails or is
    interrupted. With several processes, a script that calls this function needs `if __name__ == "__main__":`, because
    the worker processes import it.

    Raises:
        UltraMemError: a source is missing or broken, the output exists or cannot be written, the tokenizer cannot
            be loaded, or no document is left for training.
        KeyboardInterrupt: SIGINT or SIGTERM ended the run.
    """
    corpus = Corpus(config)
    output = config.output.absolute()
    with (
        _sigterm_interrupts(),
        partial_directory(output, config.overwrite, TOKEN_DIRECTORY, config.sources) as directory,
        _progress_display() as display,
    ):
        if config.near_duplicates is not None:
            searching = display.add_task("looking for near-duplicates", total=None, documents=0)
            corpus.left_out = near_duplicates(corpus, config.near_duplicates, config.processes)
            display.remove_task(searching)
        tokenizer = _choose_tokenizer(config, corpus, display)
        tokenizer.tokenizer.save(str(directory / TOKENIZER_NAME))
        _write_splits(config, corpus, tokenizer, directory, display)
    return load_manifest(output)


def print_summary(manifest: Manifest) -> None:
    """Print what was written to each split, and what was skipped."""
    console = Console(highlight=False, soft_wrap=True)
    names = ("files", "documents", "tokens", "bytes", "bytes per token")
    table = Table("split", *(Column(name, justify="right") for name in names))
    for split in manifest.splits.values():
        counts = (len(split.files), split.documents, split.tokens, split.bytes)
        ratio = f"{split.bytes / split.tokens:.3f}" if split.tokens else "none"
        table.add_row(split.name, *(f"{count:,}" for count in counts), ratio)
    console.print(table)
    console.print(f"tokenizer: {escape(manifest.tokenizer)}, {manifest.dtype}", end="; ")
    console.print(f"skipped records: {manifest.skipped:,}; near-duplicates left out: {manifest.near_duplicates:,}")
    for example in manifest.skipped_examples:
        console.print(f"  {escape(example)}")
    if manifest.skipped > len(manifest.skipped_examples):
        console.print("  ...")
    if not manifest.splits["heldout"].files:
        console.print(
            "[yellow]no document is held out[/], so there is nothing to evaluate on; change --heldout or --seed"
        )
    console.print(f"written to {escape(str(manifest.directory))}")


def _progress_display() -> Progress:
    """A progress display on standard error; it shows nothing unless that is a terminal."""
    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet,
    )


def _choose_tokenizer(config: TokenizeConfig, corpus: Corpus, display: Progress) -> ChosenTokenizer:
    if config.train_bpe is None:
        assert config.tokenizer is not None
        return load_tokenizer(config.tokenizer, config.eos_token, config.eos_id, config.pad_token)
    sample = _sample(corpus, config.seed, display)
    training = display.add_task("training the BPE", total=None, documents=len(sample))
    tokenizer = call_in_process(train_bpe, sample, config.train_bpe)
    display.remove_task(training)
    return tokenizer


def _sample(corpus: Corpus, seed: int, display: Progress) -> list[str]:
    """Texts of the training documents, or a sample of `BPE_SAMPLE_BYTES`: those with the smallest draws."""
    chosen: list[tuple[float, str, int]] = []  # a heap, the largest draw first
    size = 0
    reading = display.add_task("reading for the BPE", total=corpus.size_on_disk, documents=0)
    for number, document in enumerate(corpus, start=1):
        display.update(reading, completed=corpus.completed, documents=number)
        if corpus.is_heldout(document):
            continue
        heapq.heappush(chosen, (-draw(document, seed), document.text, document.num_bytes))
        size += document.num_bytes
        while size > BPE_SAMPLE_BYTES and len(chosen) > 1:
            size -= heapq.heappop(chosen)[2]
    display.update(reading, completed=corpus.size_on_disk)
    return [text for _, text, _ in chosen]


def _write_splits(
    config: TokenizeConfig, corpus: Corpus, tokenizer: ChosenTokenizer, directory: Path, display: Progress
) -> None:
    """Write the token files, then the manifest and the checksums."""
    train, heldout = (SplitWriter(directory / name, config.shard_tokens) for name in ("train", "heldout"))
    tokenizing = display.add_task("tokenizing", total=corpus.size_on_disk, documents=0)
    encoder = (tokenizer.tokenizer.to_str(), tokenizer.eos_token_id, tokenizer.dtype)
    with closing(map_documents(corpus, Encoder, encoder, config.processes)) as encoded:
        for number, (document, tokens) in enumerate(encoded, start=1):
            (heldout if corpus.is_heldout(document) else train).write(document, tokens)
            display.update(tokenizing, completed=corpus.completed, documents=number)
    display.update(tokenizing, completed=corpus.size_on_disk)
    splits = {split.name: split for split in (train.finish(), heldout.finish())}
    if not splits["train"].files:
        raise UltraMemError(
            f"no document is left for training ({splits['heldout'].documents} held out, {corpus.skipped} skipped); "
            "give more text, raise --max-size or lower --heldout"
        )
    paths = [str(path) for path in config.sources]
    manifest = Manifest(
        directory=directory,
        splits=splits,
        dtype=tokenizer.dtype,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tokenizer=tokenizer.name,
        seed=config.seed,
        sources={"paths": paths, "files": len(corpus.files), "bytes": corpus.size_on_disk},
        arguments={name: value for name, value in asdict(config).items() if name not in NOT_ARGUMENTS},
        near_duplicates=len(corpus.left_out),
        skipped=corpus.skipped,
        skipped_examples=tuple(corpus.skipped_examples),
    )
    save_manifest(manifest)
    manifest.save_checksums()


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does, in the main thread; other threads cannot set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
