"""Token files cut into the sequences that a model is evaluated on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ultramem.errors import ConfigError, UltraMemError

IGNORED = -100  # label of what is not predicted, as in PyTorch's cross-entropy


class TokenSequences:
    """Consecutive sequences of token files that do not overlap; the last one of a file may be shorter.

    All tokens of a sequence except the first are predicted. Files are memory-mapped.

    Args:
        paths: headerless little-endian token files.
        dtype: `uint16` or `uint32`.
        vocab_size: every id must be below it.
        length: tokens per sequence.
        max_tokens: maximum number of tokens, rounded up to whole sequences, which are spread evenly; None for all.

    Attributes:
        predicted_tokens: number of predicted tokens in all sequences.
        complete: whether all tokens of the files are used.

    Raises:
        ConfigError: `length` or `max_tokens` is invalid.
        UltraMemError: no file has two tokens; or, while reading, an id is too large.
    """

    def __init__(
        self, paths: Sequence[Path], dtype: str, vocab_size: int, length: int, max_tokens: int | None = None
    ) -> None:
        if length < 2:
            raise ConfigError(f"sequence_length={length}: must be at least 2, a token to read and a token to predict")
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens={max_tokens}: must be at least 1; leave it out to evaluate on all tokens")
        self.paths = paths
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.vocab_size = vocab_size
        self.length = length
        self._sizes = [path.stat().st_size // self.dtype.itemsize for path in paths]
        # The rest of a file is a sequence if it has two tokens.
        counts = [(size + length - 2) // length for size in self._sizes]
        self._first_sequences = list(accumulate(counts, initial=0))
        self._total = self._first_sequences.pop()
        if self._total == 0:
            raise UltraMemError(
                f"{paths[0]} has fewer than two tokens, so there is nothing to predict; give longer token files"
            )
        self._chosen = self._total if max_tokens is None else min(self._total, -(-max_tokens // length))
        self.complete = self._chosen == self._total
        self.predicted_tokens = sum(stop - start - 1 for _, start, stop in self._spans())

    def __len__(self) -> int:
        """Number of sequences."""
        return self._chosen

    def __iter__(self) -> Iterator[NDArray[np.unsignedinteger]]:
        """Yield the sequences, each (at most `length`,)."""
        for file, spans in groupby(self._spans(), itemgetter(0)):
            tokens = np.memmap(self.paths[file], mode="r", dtype=self.dtype)
            for _, start, stop in spans:
                sequence = tokens[start:stop]
                if (largest := int(sequence.max())) >= self.vocab_size:
                    raise UltraMemError(
                        f"token file {self.paths[file]} has id {largest} near token {start}, but the model's "
                        f"vocabulary has {self.vocab_size} tokens; give files made with the tokenizer of its training"
                    )
                yield sequence

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels, each (at most `batch_size`, at most `length - 1`), int64.

        Labels are the next tokens, and `IGNORED` after the end of a shorter sequence.
        """
        sequences = iter(self)
        while batch := list(islice(sequences, batch_size)):
            rows = [torch.from_numpy(sequence.astype(np.int64)) for sequence in batch]
            tokens = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
            yield tokens[:, :-1].clamp(min=0), tokens[:, 1:]

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """Yield file, start and stop of each chosen sequence."""
        for i in range(self._chosen):
            sequence = i * self._total // self._chosen
            file = bisect_right(self._first_sequences, sequence) - 1
            start = (sequence - self._first_sequences[file]) * self.length
            yield file, start, min(start + self.length, self._sizes[file])
