"""Token files cut into the windows that a model is evaluated on."""

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


class TokenWindows:
    """Windows that do not overlap, from the start of each file; its last window may be shorter.

    All tokens of a window but the first are predicted. The files are mapped, not read, into memory.

    Args:
        paths: headerless little-endian token files.
        dtype: `uint16` or `uint32`.
        vocab_size: every id must be below it.
        length: tokens of a window.
        max_tokens: take so many tokens at most, rounded up to whole windows, which are spread evenly over the files;
            None for all.

    Attributes:
        length: tokens of a window.
        predicted_tokens: in all windows.
        complete: whether `max_tokens` leaves out none.

    Raises:
        ConfigError: `length` or `max_tokens` cannot work.
        UltraMemError: there is no window of two tokens; while reading: an id is too large.
    """

    def __init__(
        self, paths: Sequence[Path], dtype: str, vocab_size: int, length: int, max_tokens: int | None = None
    ) -> None:
        if length < 2:
            raise ConfigError(f"sequence_length={length}: must be at least 2, one token to read and one to predict")
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens={max_tokens}: must be at least 1; leave it out to evaluate on all tokens")
        self.paths = paths
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.vocab_size = vocab_size
        self.length = length
        self._sizes = [path.stat().st_size // self.dtype.itemsize for path in paths]
        # What is left of a file is a window if it has two tokens.
        counts = [(size + length - 2) // length for size in self._sizes]
        self._first_windows = list(accumulate(counts, initial=0))
        self._total = self._first_windows.pop()
        if self._total == 0:
            raise UltraMemError(f"{paths[0]} has fewer than two tokens: nothing to predict; name longer token files")
        self._chosen = self._total if max_tokens is None else min(self._total, -(-max_tokens // length))
        self.complete = self._chosen == self._total
        self.predicted_tokens = sum(stop - start - 1 for _, start, stop in self._spans())

    def __len__(self) -> int:
        """Number of windows."""
        return self._chosen

    def __iter__(self) -> Iterator[NDArray[np.unsignedinteger]]:
        """The windows, each (at most `length`,)."""
        for file, spans in groupby(self._spans(), itemgetter(0)):
            tokens = np.memmap(self.paths[file], mode="r", dtype=self.dtype)
            for _, start, stop in spans:
                window = tokens[start:stop]
                if (largest := int(window.max())) >= self.vocab_size:
                    raise UltraMemError(
                        f"token file {self.paths[file]} has id {largest} near token {start}, but the model's "
                        f"vocabulary has {self.vocab_size} tokens; give files of the tokenizer that it was trained with"
                    )
                yield window

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels, each (at most `batch_size`, at most `length - 1`), int64.

        Labels are the next tokens; after a shorter window's end they are `IGNORED`.
        """
        windows = iter(self)
        while batch := list(islice(windows, batch_size)):
            rows = [torch.from_numpy(window.astype(np.int64)) for window in batch]
            tokens = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
            yield tokens[:, :-1].clamp(min=0), tokens[:, 1:]

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """File, start and stop of the chosen windows."""
        for i in range(self._chosen):
            window = i * self._total // self._chosen
            file = bisect_right(self._first_windows, window) - 1
            start = (window - self._first_windows[file]) * self.length
            yield file, start, min(start + self.length, self._sizes[file])
