"""Choosing between an operation's plain PyTorch definition and its fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

from ultramem.errors import UltraMemError

Backend = Literal["auto", "naive", "fused"]

_backend: ContextVar[Backend] = ContextVar("backend", default="auto")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Fix the backend of every operation inside a `with` block.

    `auto`, the default, takes the fused kernel where there is one that supports the arguments; `naive` always
    takes plain PyTorch; `fused` raises where there is no kernel.

    Raises:
        UltraMemError: there is no such backend.
    """
    if backend not in get_args(Backend):
        raise UltraMemError(f"backend {backend!r}: must be one of {', '.join(get_args(Backend))}")
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


class Operation:
    """A function on tensors with a definition in plain PyTorch and, once registered, a fused kernel.

    Args:
        naive: the definition; it runs on any device and in any floating-point dtype.
    """

    def __init__(self, naive: Callable[..., Any]) -> None:
        self.naive = naive
        self.__doc__ = naive.__doc__
        self.__name__ = naive.__name__
        self._fused: Callable[..., Any] | None = None
        self._supports: Callable[..., bool] = lambda *args, **kwargs: False

    def register_fused(self, fused: Callable[..., Any], supports: Callable[..., bool]) -> None:
        """Add a kernel of the same signature and the test of whether it takes given arguments."""
        self._fused, self._supports = fused, supports

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        backend = _backend.get()
        if backend == "naive":
            return self.naive(*args, **kwargs)
        if self._fused is not None and self._supports(*args, **kwargs):
            return self._fused(*args, **kwargs)
        if backend == "fused":
            raise UltraMemError(f"{self.__name__} has no fused kernel for these arguments; use the backend 'auto'")
        return self.naive(*args, **kwargs)
