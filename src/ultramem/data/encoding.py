"""Turning documents into token ids, in one process or several, always in the documents' order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import numpy as np
from tokenizers import Tokenizer

from ultramem.data.documents import Document
from ultramem.data.tokenizers import ChosenTokenizer
from ultramem.errors import UltraMemError

CHUNK_BYTES = 2**20  # text that a worker process gets at a time


class Encoder:
    """Encodes texts and ends each with the end-of-text token.

    Special tokens spelled out in a text are encoded as ordinary text, so that no document can end another.

    Args:
        tokenizer: The tokenizer in the JSON form of the `tokenizers` library.
        eos_token_id: Appended to every text.
        dtype: Of the arrays returned, `uint16` or `uint32`, little-endian.
    """

    def __init__(self, tokenizer: str, eos_token_id: int, dtype: str) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.encode_special_tokens = True
        self.eos_token_id = eos_token_id
        self.dtype = np.dtype(dtype).newbyteorder("<")

    def __call__(self, text: str) -> np.ndarray:
        """Token ids (n + 1,) of a text of n tokens."""
        # Of the library's calls only this one leaves out the characters' offsets, which take time and memory.
        (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array([*encoding.ids, self.eos_token_id], dtype=self.dtype)


def encode_documents(
    documents: Iterable[Document], tokenizer: ChosenTokenizer, processes: int
) -> Generator[tuple[Document, np.ndarray], None, None]:
    """Each document with its token ids, the end-of-text token included.

    Close the iterator to end the worker processes early.

    Raises:
        UltraMemError: A worker process died.
    """
    arguments = (tokenizer.tokenizer.to_str(), tokenizer.eos_token_id, tokenizer.dtype)
    if processes > 1:
        yield from _encode_in_processes(documents, arguments, processes)
        return
    encoder = Encoder(*arguments)
    for document in documents:
        yield document, encoder(document.text)


def _encode_in_processes(
    documents: Iterable[Document], arguments: tuple[str, int, str], processes: int
) -> Generator[tuple[Document, np.ndarray], None, None]:
    # Not forked: this process may hold locks of the tokenizer's threads, which a fork would copy locked.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=arguments)
    waiting: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
    try:
        for chunk in _chunks(documents):
            with _interrupts_blocked():
                waiting.append((chunk, pool.submit(_encode, [document.text for document in chunk])))
            if len(waiting) > 2 * processes:
                yield from _results(*waiting.popleft())
        while waiting:
            yield from _results(*waiting.popleft())
    except BrokenProcessPool as error:
        raise UltraMemError(
            "a worker process died, perhaps for lack of memory; run again with fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[Document]) -> Generator[list[Document], None, None]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.num_bytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _results(
    chunk: list[Document], tokens: Future[list[np.ndarray]]
) -> Generator[tuple[Document, np.ndarray], None, None]:
    yield from zip(chunk, tokens.result(), strict=True)


@contextmanager
def _interrupts_blocked() -> Generator[None, None, None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all of them: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In a worker process:

_encoder: Encoder


def _start_worker(*arguments: str | int) -> None:
    global _encoder
    _encoder = Encoder(*arguments)  # type: ignore[arg-type]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for work from a pipe that it holds open itself, so it would outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return [_encoder(text) for text in texts]
