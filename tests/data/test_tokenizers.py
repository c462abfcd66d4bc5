"""Which tokenizer a name means, its special tokens, and a BPE trained on the spot."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ultramem.data.tokenizers import Encoder, load_tokenizer, train_bpe
from ultramem.errors import ConfigError, UltraMemError
from ultramem.files.checksums import Checksums


def word_level(directory: Path, *tokens: str, name: str = "tokenizer.json") -> Path:
    """A file with a tokenizer of whole words whose ids are their places in `tokens`."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(directory / name))
    return directory / name


@pytest.mark.parametrize(
    ("name", "eos"),
    [("allenai/gpt-neox-olmo-dolma-v1_5", 50279), ("allenai/eleuther-ai-gpt-neox-20b-pii-special", 0)],
)
def test_shipped_tokenizers(name: str, eos: int) -> None:
    pytest.importorskip("olmo_eval")
    tokenizer = load_tokenizer(name)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (eos, 1)
    assert (tokenizer.vocab_size, tokenizer.dtype) == (50280, "uint16")


def test_file_and_directory(tmp_path: Path) -> None:
    file = word_level(tmp_path, "unknown", "a", "b", "</s>", "<pad>")
    for name in (file, tmp_path):
        tokenizer = load_tokenizer(str(name))
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size) == (3, 4, 5)
        assert tokenizer.tokenizer.encode("a b a b").ids == [1, 2, 1, 2], "truncation is taken off"


def test_special_tokens_are_overridable(tmp_path: Path) -> None:
    name = str(word_level(tmp_path, "unknown", "end", "fill", "</s>"))
    assert load_tokenizer(name).pad_token_id == 3, "without a padding token the end-of-text token pads"
    chosen = load_tokenizer(name, eos_token="end", pad_token="fill")
    assert (chosen.eos_token_id, chosen.pad_token_id) == (1, 2)
    assert load_tokenizer(name, eos_id=0).eos_token_id == 0
    with pytest.raises(ConfigError, match="eos_token='stop': must be"):
        load_tokenizer(name, eos_token="stop")
    with pytest.raises(ConfigError, match="pad_token='stop': must be"):
        load_tokenizer(name, pad_token="stop")
    with pytest.raises(ConfigError, match=r"eos_id=4: .* 0 to 3"):
        load_tokenizer(name, eos_id=4)


def test_settings_of_transformers_are_read(tmp_path: Path) -> None:
    word_level(tmp_path, "unknown", "end", "fill", "</s>")
    settings = {"eos_token": {"content": "end"}, "pad_token": "fill", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    chosen = load_tokenizer(str(tmp_path))
    assert (chosen.eos_token_id, chosen.pad_token_id) == (1, 2)


def test_no_known_end_of_text_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--eos-token"):
        load_tokenizer(str(word_level(tmp_path, "unknown", "a")))


def test_wide_vocabulary_needs_uint32(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(2**16 - 1)]
    assert load_tokenizer(str(word_level(tmp_path, "</s>", *words))).dtype == "uint16"
    assert load_tokenizer(str(word_level(tmp_path, "</s>", "more", *words))).dtype == "uint32"


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UltraMemError, match=r"bad.json cannot be read as a tokenizer.json"):
        load_tokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(UltraMemError, match=r"has no tokenizer.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UltraMemError, match="does not exist"):
        load_tokenizer("some/where.json")

    def unreachable(name: str) -> Tokenizer:
        raise OSError("no route\nto host")

    monkeypatch.setattr(Tokenizer, "from_pretrained", unreachable)
    with pytest.raises(
        UltraMemError, match=r"gpt2 is not a local file .* \(no route\); check its name and the network"
    ):
        load_tokenizer("gpt2")


def test_bpe_merges_by_frequency_and_restores_any_text() -> None:
    # "ab" is the most frequent pair; then "abab" or "abc" follow from it.
    chosen = train_bpe(["ab ab ab abc abc", "ab"], 259)
    vocabulary = chosen.tokenizer.get_vocab()
    assert (vocabulary["<|endoftext|>"], vocabulary["<|padding|>"]) == (0, 1)
    assert (chosen.eos_token_id, chosen.pad_token_id, chosen.vocab_size) == (0, 1, 259)
    assert vocabulary["ab"] == 258
    for text in ("ab", "Grüße\n\t世界 🌍\x00", "  def f(x):\r\n"):
        assert chosen.tokenizer.decode(chosen.tokenizer.encode(text).ids) == text


def test_bpe_does_not_depend_on_the_order_of_texts() -> None:
    texts = [Path(__file__).read_text(encoding="utf-8"), "some other text", "and one more, a third"]
    assert train_bpe(texts, 400).tokenizer.to_str() == train_bpe(texts[::-1], 400).tokenizer.to_str()


def reference_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE that learns from words of any length."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_a_bpe_of_ordinary_text_is_the_usual_one() -> None:
    """The same bytes, also with words as long as are learnt from whole."""
    folder = Path(os.__file__).parent
    texts = [(folder / name).read_text() for name in ("os.py", "argparse.py", "typing.py", "this.py")]
    texts += ["ab" * 512, "=" * 1024, "\n" * 1024]
    assert train_bpe(texts, 600).tokenizer.to_str() == reference_bpe(texts, 600).to_str()


@pytest.mark.parametrize("letters", ["a", "ACGT", "\u4e2d", " "])
def test_a_bpe_of_unbroken_text_takes_no_longer(letters: str) -> None:
    """256 kB took half a minute; all of it is learnt from."""
    random = Random(0)
    text = "".join(random.choices(letters, k=2**18 // len(letters.encode()[:3])))
    start = time.perf_counter()
    chosen = train_bpe([text], 400)
    encode = Encoder(chosen.tokenizer.to_str(), 0, "uint16")
    tokens = encode(text)
    assert time.perf_counter() - start < 5
    assert chosen.tokenizer.decode(tokens[:-1].tolist()) == text
    assert len(tokens) < len(text) / 2


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damage_is_found(tmp_path: Path, name: str) -> None:
    """In a token directory or a model's, which have checksums."""
    word_level(tmp_path, "a", "</s>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    Checksums.compute(tmp_path, ["tokenizer.json", "tokenizer_config.json"]).save()
    assert load_tokenizer(str(tmp_path)).eos_token_id == load_tokenizer(str(tmp_path / "tokenizer.json")).eos_token_id
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace('"a"', '"b"'))
    with pytest.raises(UltraMemError, match=rf"{name} is damaged: it differs from its checksum; copy it again"):
        load_tokenizer(str(tmp_path))
