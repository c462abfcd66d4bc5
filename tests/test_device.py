"""What a device has room for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ultramem import device
from ultramem.device import check_memory, keep_freed_memory, total_memory
from ultramem.errors import ConfigError

CPU = torch.device("cpu")


def test_what_cannot_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "total_memory", lambda _: 24 * 10**9)
    check_memory({"a=1": 12 * 10**9, "b=2": 12 * 10**9}, CPU)
    with pytest.raises(ConfigError) as raised:
        check_memory({"a=1": 10**9, "b=2": 4 * 10**12}, CPU)
    assert str(raised.value) == (
        "b=2: must be lower, as at least 4,001 GB of memory are needed and the machine has 24 GB; choose smaller sizes"
    )
    with pytest.raises(ConfigError, match="and the GPU has 24 GB"):
        check_memory({"b=2": 10**400}, torch.device("cuda"))


def test_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of Linux's own table, or a container's limit if there is one and it is less."""
    monkeypatch.setattr(Path, "read_text", lambda path: {"memory.max": "max\n"}.get(path.name) or "9223372036854771712")
    with Path("/proc/meminfo").open() as file:
        kilobytes = int(file.readline().split()[1])
    assert total_memory(CPU) == pytest.approx(1024 * kilobytes, rel=0.01)
    monkeypatch.setattr(Path, "read_text", lambda path: "1000000\n")
    assert total_memory(CPU) == 1_000_000


def test_freed_memory_is_kept_where_the_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda option, value: asked.append((option, value)))
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(device.sys, "platform", "linux")
    keep_freed_memory()
    assert asked == [(-4, 0), (-1, -1)]
    del library.mallopt  # musl
    keep_freed_memory()
    monkeypatch.setattr(device.sys, "platform", "darwin")
    keep_freed_memory()
    assert len(asked) == 2
