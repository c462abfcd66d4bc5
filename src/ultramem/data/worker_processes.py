"""Work in other processes: on each document's text, in the documents' order, or a call that can be ended at once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event
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
    stop = context.Event()
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(make, arguments, stop))
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
        stop.set()
        pool.shutdown(cancel_futures=True)


def call_in_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, which is killed at once if this one is interrupted or ends.

    For long calls of libraries, which are deaf to signals. Function, arguments and result are pickled.

    Raises:
        UltraMemError: the process died.
        Exception: the function raised it.
    """
    # Not of multiprocessing, which would import the caller's script again. A group of its own sees no Ctrl-C.
    command = [sys.executable, "-c", f"from {__name__} import answer; answer()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((function, arguments), process.stdin)
            process.stdin.flush()
            result, error = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as ended:
            raise UltraMemError("a worker process died, perhaps for lack of memory; give it less text") from ended
        finally:
            process.kill()
    if error is not None:
        raise error
    return result


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
_stop: Event


def _start_worker(make: Callable[..., Callable[[str], Any]], arguments: tuple[Any, ...], stop: Event) -> None:
    global _function, _stop
    _function, _stop = make(*arguments), stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit with the parent: a worker waits on a pipe that it holds open itself, and would outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(texts: list[str]) -> list[Any]:
    return [_function(text) for text in texts if not _stop.is_set()]


def answer() -> None:
    """Make the call that comes through standard input, and write its result and error to standard output."""
    function, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_input, daemon=True).start()
    outcome: tuple[Any, Exception | None]
    try:
        outcome = function(*arguments), None
    except Exception as error:
        outcome = None, error
    pickle.dump(outcome, sys.stdout.buffer)
    sys.stdout.flush()


def _end_with_input() -> None:
    """Exit when the parent closes this process's standard input, however it ends."""
    sys.stdin.buffer.read()
    os._exit(1)
