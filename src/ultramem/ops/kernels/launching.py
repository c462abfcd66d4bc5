"""Launching Triton kernels with little work for the CPU, which launches many of them per step."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

_MOST_KEPT = 4096


class Launcher:
    """A Triton kernel that is looked up by its arguments once it is compiled.

    Triton inspects all arguments at every launch for the properties that a kernel is specialised for: 16-byte
    alignment, integers that are 1 or multiples of 16. Here integers are compared by value, which is less work.

    A kernel with a constant `OVERLAPS` that is true begins with `wait_for_others`: the GPU starts it before the kernels
    before it have ended (programmatic dependent launch).
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel  # as returned by `triton.jit`
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: Any) -> None:
        """Launch `grid` programs; the first argument is a tensor, constants are in the kernel's order."""
        if not isinstance(self.kernel, triton.JITFunction):  # in the interpreter
            self.kernel[grid](*arguments, **constants, num_warps=num_warps)
        elif arguments[0].device.index == torch.cuda.current_device():
            self._launch(grid, arguments, num_warps, constants)
        else:
            with torch.cuda.device(arguments[0].device):
                self._launch(grid, arguments, num_warps, constants)

    def _launch(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], num_warps: int, constants: dict[str, Any]
    ) -> None:
        key = (arguments[0].device.index, num_warps, *map(_properties, arguments), *constants.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            if len(self._compiled) == _MOST_KEPT:
                self._compiled.clear()
            assert self.kernel.arg_names[len(arguments) :] == [*constants]
            overlaps = {"launch_pdl": True} if constants.get("OVERLAPS") else {}
            self._compiled[key] = self.kernel[grid](*arguments, **constants, num_warps=num_warps, **overlaps)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values())


def _properties(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() & 15
    return float if isinstance(argument, float) else argument  # kernels are not specialised for their values


# Triton has the same two functions, for use inside kernels: several µs for a call.
def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: int, divisor: int) -> int:
    """n / divisor, rounded up."""
    return -(-n // divisor)
