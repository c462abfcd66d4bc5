"""Loss, perplexity and bits per byte against sums over single windows."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ultramem.errors import ConfigError, UltraMemError
from ultramem.evaluation import evaluate
from ultramem.evaluation.loss import count_tokens, unigram_loss


def reference_loss(run: Any, length: int) -> tuple[float, int]:
    """Mean loss in float64 and number of predicted tokens, one window at a time."""
    losses = []
    with torch.no_grad():
        for tokens in run.heldout:
            for start in range(0, len(tokens), length):
                window = torch.from_numpy(tokens[start : start + length].astype(np.int64))
                log_probabilities = run.model(window[None])[0].double().log_softmax(-1)
                losses += [-float(log_probabilities[i - 1, window[i]]) for i in range(1, len(window))]
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("length", [16, 7])
def test_values(run: Any, length: int) -> None:
    loss, tokens = reference_loss(run, length)
    result = evaluate(run.path, sequence_length=length, device="cpu")
    assert (result.checkpoint, result.split, result.tokens) == ("step7", "heldout", tokens)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    bits_per_token, tokens_per_byte = loss / math.log(2), (100 + 33 + 1) / 391
    assert result.bits_per_byte == pytest.approx(bits_per_token * tokens_per_byte, rel=1e-5)


def test_unigram_bits_per_byte(run: Any) -> None:
    counts = Counter(np.concatenate(run.train).tolist())
    heldout = np.concatenate(run.heldout).tolist()
    bits = -sum(math.log2((counts[token] + 1) / (700 + 258)) for token in heldout)
    result = evaluate(run.path, max_tokens=16)
    assert result.unigram_bits_per_byte == pytest.approx(bits / 391, rel=1e-12)
    assert evaluate(run.path, max_tokens=16, unigram=False).unigram_bits_per_byte is None


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_matter(run: Any, batch_size: int) -> None:
    expected, _ = reference_loss(run, 16)
    assert evaluate(run.path, batch_size=batch_size).loss == pytest.approx(expected, rel=1e-5)


def test_the_same_again(run: Any) -> None:
    assert evaluate(run.path).loss == evaluate(run.path).loss


def test_max_tokens(run: Any) -> None:
    result = evaluate(run.path, max_tokens=33)
    assert result.tokens in (45, 3 + 30)  # three windows, of which the first file's last has 4 tokens
    assert evaluate(run.path, max_tokens=10**6).tokens == evaluate(run.path).tokens


def test_the_train_split(run: Any) -> None:
    result = evaluate(run.path, split="train")
    assert (result.split, result.tokens) == ("train", 500 + 200 - math.ceil(500 / 16) - math.ceil(200 / 16))
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) * 700 / 2000)


def test_another_directory(run: Any, tmp_path: Path) -> None:
    moved = run.data.rename(tmp_path / "moved")
    assert evaluate(run.path, [moved]).loss == pytest.approx(reference_loss(run, 16)[0], rel=1e-5)
    with pytest.raises(UltraMemError, match="tokens does not exist"):
        evaluate(run.path)


def test_token_files(run: Any) -> None:
    files = sorted((run.data / "heldout").glob("*.npy"))
    result = evaluate(run.path, files)
    assert result.split == "files"
    assert result.loss == pytest.approx(reference_loss(run, 16)[0], rel=1e-5)
    assert result.bits_per_byte is None
    assert result.unigram_bits_per_byte is None


def test_token_files_of_another_dtype(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    run.heldout[0].astype("<u4").tofile(path)
    run.heldout = run.heldout[:1]
    assert evaluate(run.path, [path], dtype="uint32").loss == pytest.approx(reference_loss(run, 16)[0], rel=1e-5)
    with pytest.raises(ConfigError, match="dtype='int8': must be uint16 or uint32"):
        evaluate(run.path, [path], dtype="int8")


def test_a_run_trained_on_token_files(run: Any) -> None:
    train, heldout = ([str(p) for p in sorted((run.data / split).glob("*.npy"))] for split in ("train", "heldout"))
    described = (
        f"train_files: {train}\n  heldout_files: {heldout}\n  vocab_size: 258\n  eos_token_id: 0\n  dtype: uint16"
    )
    run.change_config(f"directory: {run.data}", described)
    result = evaluate(run.path)
    assert (result.split, result.bits_per_byte) == ("heldout", None)
    assert result.loss == pytest.approx(reference_loss(run, 16)[0], rel=1e-5)
    assert evaluate(run.path, split="train").tokens == 500 + 200 - math.ceil(500 / 16) - math.ceil(200 / 16)
    with pytest.raises(UltraMemError, match="files and has none for split 'test'; give some with --data"):
        evaluate(run.path, split="test")


def test_a_run_without_heldout_files(run: Any) -> None:
    train = [str(p) for p in sorted((run.data / "train").glob("*.npy"))]
    described = f"train_files: {train}\n  vocab_size: 258\n  eos_token_id: 0\n  dtype: uint16"
    run.change_config(f"directory: {run.data}", described)
    with pytest.raises(UltraMemError, match="files and has none for split 'heldout'; give some with --data"):
        evaluate(run.path)


def test_saving(run: Any, tmp_path: Path) -> None:
    result = evaluate(run.path)
    for path, target in ((None, run.path / "evaluation.json"), (tmp_path / "other.json", tmp_path / "other.json")):
        assert result.save(path) == target
        assert json.loads(target.read_text()) == {
            "checkpoint": "step7",
            "split": "heldout",
            "tokens": result.tokens,
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "unigram_bits_per_byte": result.unigram_bits_per_byte,
            "complete": True,
            "data": None,
        }
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(UltraMemError, match=r"missing/other.json cannot be written \(No such file or directory\)"):
        result.save(tmp_path / "missing" / "other.json")


def test_some_tokens_do_not_replace_all_of_them(run: Any, tmp_path: Path) -> None:
    some, path = evaluate(run.path, max_tokens=33), run.path / "evaluation.json"

    def saved() -> int:
        return int(json.loads(path.read_text())["tokens"])

    assert (some.complete, some.save(), saved()) == (False, path, some.tokens)
    fewer = evaluate(run.path, max_tokens=16)
    assert (fewer.save(), saved()) == (path, fewer.tokens)
    whole = evaluate(run.path, max_tokens=10**6)
    assert (whole.complete, whole.save(), saved()) == (True, path, whole.tokens)
    assert (some.save(), saved()) == (None, whole.tokens)
    assert some.save(tmp_path / "some.json") == tmp_path / "some.json"
    run.save_checkpoint(8)
    other = evaluate(run.path, max_tokens=33)  # of another checkpoint
    assert (other.checkpoint, other.save(), saved()) == ("step8", path, other.tokens)
    content = json.loads(path.read_text())
    del content["complete"]  # as of version 0.1
    path.write_text(json.dumps(content))
    assert other.save() is None


def test_a_larger_vocabulary_than_the_models(run: Any) -> None:
    manifest = run.data / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"vocab_size": 258', '"vocab_size": 385'))
    with pytest.raises(UltraMemError, match="has a vocabulary of 385 tokens, but the model's has 384"):
        evaluate(run.path)


def test_a_model_that_diverged(run: Any) -> None:
    with torch.no_grad():
        run.model.lm_head.norm.weight.fill_(3e38)
    run.save_checkpoint(8)
    with pytest.raises(UltraMemError, match="the loss is nan, as the training diverged; use an earlier checkpoint"):
        evaluate(run.path)


def test_values_that_cannot_work(run: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size=0: must be at least 1"):
        evaluate(run.path, batch_size=0)
    with pytest.raises(ConfigError, match="sequence_length=1: must be at least 2"):
        evaluate(run.path, sequence_length=1)
    with pytest.raises(UltraMemError, match="no split 'test'"):
        evaluate(run.path, split="test")
    with pytest.raises(ConfigError, match="unigram=True: needs a directory written by"):
        evaluate(run.path, sorted((run.data / "heldout").glob("*.npy")), unigram=True)
    with pytest.raises(UltraMemError, match=r"nothing.npy does not exist"):
        evaluate(run.path, [run.path / "nothing.npy"])


def test_only_the_runs_own_data_is_saved_in_it(run: Any, tmp_path: Path) -> None:
    other = shutil.copytree(run.data, tmp_path / "other")
    (run.data / "heldout" / "part-00001.npy").write_bytes(bytes(66))
    for options in ({"data": [other]}, {"split": "train"}, {"data": sorted((run.data / "heldout").glob("*.npy"))}):
        assert evaluate(run.path, **options).save() is None
    assert not (run.path / "evaluation.json").exists()
    found = evaluate(run.path, [other])
    assert found.save(tmp_path / "other.json") == tmp_path / "other.json"
    assert json.loads((tmp_path / "other.json").read_text())["data"] == str(other)


def test_add_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultramem.evaluation.loss.CHUNK_TOKENS", 7)  # files are read in several pieces
    random, vocab_size = np.random.default_rng(0), 20
    arrays = [random.zipf(1.5, size) % vocab_size for size in (50, 33, 40)]
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, tokens in zip(paths, arrays, strict=True):
        tokens.astype("<u4").tofile(path)
    train, heldout = [*arrays[0].tolist(), *arrays[1].tolist()], arrays[2].tolist()
    counts = Counter(train)
    expected = -sum(math.log((counts[token] + 1) / (len(train) + vocab_size)) for token in heldout) / len(heldout)
    assert any(counts[token] == 0 for token in heldout)
    assert unigram_loss(paths[:2], paths[2:], "uint32", vocab_size) == pytest.approx(expected, rel=1e-12)


def test_an_id_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "0.npy"
    np.array([1, 5], dtype="<u2").tofile(path)
    with pytest.raises(UltraMemError, match="has id 5, but the vocabulary has 5 tokens"):
        count_tokens([path], "uint16", 5)
