"""Sequences of token files, against slices of the arrays that the files were written from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ultramem.data.token_sequences import IGNORED, TokenSequences
from ultramem.errors import ConfigError, UltraMemError


def write(directory: Path, *sizes: int, dtype: str = "<u2") -> list[Path]:
    """Files of rising tokens, the first 0 to sizes[0] - 1, the second from 1000 on, and so on."""
    paths = [directory / f"{i}.npy" for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        np.arange(1000 * i, 1000 * i + size).astype(dtype).tofile(path)
    return paths


def test_sequences_do_not_overlap_and_end_with_their_file(tmp_path: Path) -> None:
    sequences = TokenSequences(write(tmp_path, 10, 1, 9, 8), "uint16", 5000, 4)
    spans = [(int(sequence[0]), len(sequence)) for sequence in sequences]
    # What is left of the third file, and all of the second, is a single token.
    assert spans == [(0, 4), (4, 4), (8, 2), (2000, 4), (2004, 4), (3000, 4), (3004, 4)]
    assert all(
        sequence.tolist() == list(range(start, start + size))
        for sequence, (start, size) in zip(sequences, spans, strict=True)
    )
    assert len(sequences) == 7
    assert sequences.predicted_tokens == 6 * 3 + 1


def test_uint32(tmp_path: Path) -> None:
    (sequence,) = TokenSequences(write(tmp_path, 3, dtype="<u4"), "uint32", 10, 5)
    assert sequence.tolist() == [0, 1, 2]


@pytest.mark.parametrize("max_tokens", [1, 4, 5, 17, 40, 1000])
def test_max_tokens_takes_whole_sequences_evenly(tmp_path: Path, max_tokens: int) -> None:
    sequences = TokenSequences(write(tmp_path, 20, 20), "uint16", 5000, 4, max_tokens)
    numbers = [int(sequence[0]) // 1000 * 5 + int(sequence[0]) % 1000 // 4 for sequence in sequences]
    assert len(sequences) == len(numbers) == min(10, -(-max_tokens // 4))
    gaps = np.diff([*numbers, 10 + numbers[0]])
    assert max(gaps) - min(gaps) <= 1
    assert sequences.predicted_tokens == 3 * len(sequences)


def test_batches_shift_labels_and_ignore_what_is_missing(tmp_path: Path) -> None:
    batches = list(TokenSequences(write(tmp_path, 10, 2), "uint16", 5000, 4).batches(3))
    inputs, labels = batches[0]
    assert inputs.tolist()[:2] == [[0, 1, 2], [4, 5, 6]]
    assert labels.tolist() == [[1, 2, 3], [5, 6, 7], [9, IGNORED, IGNORED]]
    assert inputs[2, 0] == 8
    assert (inputs >= 0).all()
    assert batches[1][0].tolist() == [[1000]]
    assert batches[1][1].tolist() == [[1001]]
    assert inputs.dtype == labels.dtype == torch.int64
    assert len(batches) == 2


def test_an_id_that_is_too_large(tmp_path: Path) -> None:
    sequences = TokenSequences(write(tmp_path, 10), "uint16", 7, 4)
    with pytest.raises(UltraMemError, match=r"0.npy has id 7 near token 4, but the model's vocabulary has 7 tokens"):
        list(sequences)


def test_values_that_cannot_work(tmp_path: Path) -> None:
    paths = write(tmp_path, 10, 1)
    with pytest.raises(ConfigError, match="sequence_length=1: must be at least 2"):
        TokenSequences(paths, "uint16", 5000, 1)
    with pytest.raises(ConfigError, match="max_tokens=0: must be at least 1"):
        TokenSequences(paths, "uint16", 5000, 4, 0)
    with pytest.raises(UltraMemError, match=r"1.npy has fewer than two tokens"):
        TokenSequences(paths[1:], "uint16", 5000, 4)
