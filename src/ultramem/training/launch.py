"""What torchrun tells each process in its environment."""

from __future__ import annotations

import os

from ultramem.errors import ConfigError


def launched_processes() -> int | None:
    """Number of processes that torchrun started, of which this is one; None if it was started otherwise.

    Raises:
        ConfigError: RANK and WORLD_SIZE contradict each other, or a variable of torchrun is no number.
    """
    rank, count = environment_number("RANK"), environment_number("WORLD_SIZE")
    if rank is None and count in (None, 1):
        return None
    if rank is None or count is None or rank >= count:
        raise ConfigError(
            f"RANK={rank}: must be from 0 to below WORLD_SIZE={count} in the environment; start with torchrun, or "
            "unset both"
        )
    return count


def check_launch() -> None:
    """Check the other variables by which processes find each other.

    Raises:
        ConfigError: one of them is missing or is no number.
    """
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        value = os.environ.get(name) if name == "MASTER_ADDR" else environment_number(name)
        if value in (None, ""):
            raise ConfigError(f"{name}: must be set in the environment, as RANK is; start with torchrun")


def environment_number(name: str) -> int | None:
    """The whole number in an environment variable; None if it is not set.

    Raises:
        ConfigError: there is something else in it.
    """
    text = os.environ.get(name)
    if text is not None and not (text.isdecimal() and len(text) < 10):
        raise ConfigError(
            f"{name}={text!r}: must be a whole number in the environment; start with torchrun, or unset it"
        )
    return None if text is None else int(text)
