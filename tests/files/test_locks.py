"""Directories have one writer at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from ultramem.errors import UltraMemError
from ultramem.files.directories import locked


def test_one_holds_the_lock(tmp_path: Path) -> None:
    with (
        locked(tmp_path, "taken"),
        pytest.raises(UltraMemError, match=r"^taken$"),
        locked(tmp_path, "taken"),
    ):
        pass
    with pytest.raises(BlockingIOError), locked(tmp_path, "taken"):
        raise BlockingIOError  # of what is done inside: not the lock's
    with locked(tmp_path, "taken"):
        pass
