"""What is said of other libraries' errors."""

from __future__ import annotations

import errno
import os

import pytest

from ultramem.errors import first_line, system_reason


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.txt"), "No space left on device"),
        (OSError("disk full\nreally"), "disk full"),
        (OSError(), "OSError"),
    ],
)
def test_reason_of_a_system_error(error: OSError, said: str) -> None:
    assert system_reason(error) == said


def test_first_line() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
