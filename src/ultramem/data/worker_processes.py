"""Applying a function to each document's text, in one process or several, in the documents' order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from ultramem.data.documents import Document
from ultramem.errors import UltraMemError

CHUNK_BYTES = 2**20  # text that a worker process gets at a time

T = TypeVar("T")


def map_documents(
    documents: Iterable[Document], make: Callable[..., Callable[[str], T]], arguments: tuple[Any, ...], processes: int
) -> Generator[tuple[Document, T], None, None]:
    """Yield each document with the result of a function of its text.

    Every process makes the function once, by `make(*arguments)`. Close the iterator to end the worker processes early.
    Raises UltraMemError if a worker process died.
    """
    if processes <= 1:
        function = make(*arguments)
        yield from ((document, function(document.text)) for document in documents)
        return
    # Not forked: this process may hold locks of the tokenizer's threads, which a fork would copy locked.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(make, arguments))
    waiting: deque[tuple[list[Document], Future[list[T]]]] = deque()
    try:
        for chunk in _chunks(documents):
            with _interrupts_blocked():
                waiting.append((chunk, pool.submit(_call, [document.text for document in chunk])))
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


def _results(chunk: list[Document], values: Future[list[T]]) -> Generator[tuple[Document, T], None, None]:
    yield from zip(chunk, values.result(), strict=True)


@contextmanager
def _interrupts_blocked() -> Generator[None, None, None]:
    """Start processes inside that do not see Ctrl-C, which a terminal sends to all of them: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In a worker process:

_function: Callable[[str], Any]


def _start_worker(make: Callable[..., Callable[[str], Any]], arguments: tuple[Any, ...]) -> None:
    global _function
    _function = make(*arguments)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit with the parent: a worker waits on a pipe that it holds open itself, and would outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(texts: list[str]) -> list[Any]:
    return [_function(text) for text in texts]
