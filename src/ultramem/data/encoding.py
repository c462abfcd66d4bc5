"""Encoding documents as token ids, in the documents' order."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import numpy as np
from tokenizers import Tokenizer

from ultramem.data.documents import Document
from ultramem.data.tokenizers import ChosenTokenizer
from ultramem.data.worker_processes import map_documents


class Encoder:
    """Encodes texts and ends each with the end-of-text token.

    Special tokens spelled out in a text are encoded as ordinary text, so that no document can end another.

    Args:
        tokenizer: the tokenizer in the JSON form of the `tokenizers` library.
        eos_token_id: appended to every text.
        dtype: dtype of the returned arrays, `uint16` or `uint32`, little-endian.
    """

    def __init__(self, tokenizer: str, eos_token_id: int, dtype: str) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.encode_special_tokens = True
        self.eos_token_id = eos_token_id
        self.dtype = np.dtype(dtype).newbyteorder("<")

    def __call__(self, text: str) -> np.ndarray:
        """Token ids (n + 1,) of a text of n tokens."""
        # The library's other calls also compute the characters' offsets, which takes time and memory.
        (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array([*encoding.ids, self.eos_token_id], dtype=self.dtype)


def encode_documents(
    documents: Iterable[Document], tokenizer: ChosenTokenizer, processes: int
) -> Generator[tuple[Document, np.ndarray], None, None]:
    """Yield each document with its token ids, including the end-of-text token; otherwise as `map_documents`."""
    arguments = (tokenizer.tokenizer.to_str(), tokenizer.eos_token_id, tokenizer.dtype)
    return map_documents(documents, Encoder, arguments, processes)
