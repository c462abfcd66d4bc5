"""What torchrun tells its processes, and what somebody else may have set."""

from __future__ import annotations

import pytest

from ultramem.errors import ConfigError
from ultramem.training.launch import check_launch, launched_processes

COMPLETE = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMPLETE:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"MASTER_PORT": "tcp://10.0.0.1:80", "LOCAL_RANK": "x"}, None),  # Kubernetes sets such; nothing was launched
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1),
        (COMPLETE, 4),
    ],
)
def test_number_of_processes(variables: dict[str, str], count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, variables)
    assert launched_processes() == count


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x"}, r"^RANK='x': must be a whole number in the environment; start with torchrun, or unset it$"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "^RANK='-1': "),
        ({"RANK": "", "WORLD_SIZE": "2"}, "^RANK='': "),
        ({"RANK": "0", "WORLD_SIZE": "1e3"}, "^WORLD_SIZE='1e3': "),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "2"}, "^RANK='999"),
        ({"RANK": "0"}, "^RANK=0: must be from 0 to below WORLD_SIZE=None in the environment; start with torchrun"),
        ({"WORLD_SIZE": "2"}, "^RANK=None: must be from 0 to below WORLD_SIZE=2"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "^RANK=2: must be from 0 to below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "^RANK=0: must be from 0 to below WORLD_SIZE=0"),
    ],
)
def test_wrong_numbers(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(ConfigError, match=message):
        launched_processes()


@pytest.mark.parametrize("name", ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_what_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, COMPLETE)
    check_launch()
    monkeypatch.delenv(name)
    with pytest.raises(
        ConfigError, match=rf"^{name}: must be set in the environment, as RANK is; start with torchrun$"
    ):
        check_launch()
    if name != "MASTER_ADDR":
        monkeypatch.setenv(name, "x")
        with pytest.raises(ConfigError, match=rf"^{name}='x': must be a whole number"):
            check_launch()
