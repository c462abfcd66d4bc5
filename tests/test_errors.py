"""What is said of other libraries' errors."""

from __future__ import annotations

import errno
import os

import pytest

from ultramem.errors import ConfigError, UltraMemError, first_line, system_reason


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


def test_a_message_is_one_line_that_can_be_printed() -> None:
    assert str(ConfigError("dtype=a\nb\ud800\x1e é 数: must be 'x'")) == r"dtype=a\nb\ud800\x1e é 数: must be 'x'"
    message = str(UltraMemError("a" * 5000 + "; do this"))
    assert len(message) == 1005
    assert message.endswith("aaa; do this")
