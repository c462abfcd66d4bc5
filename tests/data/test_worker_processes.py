"""A call in a process of its own: its result, its error, and its end."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ultramem.data.worker_processes import call_in_process
from ultramem.errors import UltraMemError

# Interrupts itself while the other process, whose id it prints, is busy for good.
PROGRAM = """
import os, signal, subprocess, sys, threading, time
from ultramem.data import worker_processes

def end():
    time.sleep(0.3)
    os.kill(os.getpid(), int(sys.argv[1]))

original = subprocess.Popen
def start(*arguments, **options):
    process = original(*arguments, **options)
    print(process.pid, flush=True)
    threading.Thread(target=end, daemon=True).start()
    return process

subprocess.Popen = start
signal.signal(signal.SIGINT, signal.default_int_handler)
worker_processes.call_in_process(time.sleep, 1000)
"""


def test_result_and_error() -> None:
    assert call_in_process(divmod, 7, 3) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        call_in_process(operator.truediv, 1, 0)


def test_a_process_that_dies() -> None:
    with pytest.raises(UltraMemError, match="a worker process died, perhaps for lack of memory"):
        call_in_process(os._exit, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_its_parent(number: signal.Signals) -> None:
    """Interrupted or killed, and at once."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(int(number))], capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == (-number if number == signal.SIGKILL else -signal.SIGINT)
    for _ in range(100):
        if not Path(f"/proc/{int(ended.stdout)}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("it goes on")
