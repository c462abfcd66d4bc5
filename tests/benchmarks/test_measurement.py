"""Benchmarks find out before they measure whether they can write."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.measurement import check_outputs

from ultramem.errors import UltraMemError


def test_outputs_are_checked_before(tmp_path: Path) -> None:
    check_outputs(tmp_path / "deep" / "new", "a.json", "a.png")
    assert not any((tmp_path / "deep" / "new").iterdir())
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UltraMemError, match=r"a.png cannot be written \(Is a directory\)"):
        check_outputs(tmp_path, "a.json", "a.png")
    (tmp_path / "file").touch()
    with pytest.raises(UltraMemError, match=r"file/new cannot be written \(Not a directory\)"):
        check_outputs(tmp_path / "file" / "new", "a.json")
