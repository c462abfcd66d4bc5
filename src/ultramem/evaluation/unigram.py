"""The unigram model: a baseline that knows only the frequencies of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ultramem.errors import UltraMemError

CHUNK_TOKENS = 2**20


def unigram_loss(train: Sequence[Path], heldout: Sequence[Path], dtype: str, vocab_size: int) -> float:
    """Cross-entropy of held-out tokens under the unigram model of the training tokens, in nats per token.

    A token that occurs n times in N training tokens has the probability (n + 1) / (N + vocab_size).

    Args:
        train: token files to count.
        heldout: token files to evaluate on, with all their tokens.
        dtype: `uint16` or `uint32`.
        vocab_size: vocabulary size; every id must be below it.

    Raises:
        UltraMemError: an id is too large.
    """
    counts = count_tokens(train, dtype, vocab_size)
    heldout_counts = count_tokens(heldout, dtype, vocab_size)
    log_probabilities = np.log(counts + 1) - np.log(counts.sum() + vocab_size)
    return float(-(heldout_counts * log_probabilities).sum() / heldout_counts.sum())


def count_tokens(paths: Sequence[Path], dtype: str, vocab_size: int) -> NDArray[np.int64]:
    """Count the occurrences of each token in token files, (vocab_size,), int64.

    Raises:
        UltraMemError: an id is too large.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for path in paths:
        tokens = np.memmap(path, mode="r", dtype=np.dtype(dtype).newbyteorder("<"))
        for start in range(0, len(tokens), CHUNK_TOKENS):
            found = np.bincount(tokens[start : start + CHUNK_TOKENS], minlength=vocab_size)
            if len(found) > vocab_size:
                raise UltraMemError(
                    f"token file {path} has id {len(found) - 1}, but the vocabulary has {vocab_size} tokens; "
                    "tokenize again with --overwrite"
                )
            counts += found
    return counts
