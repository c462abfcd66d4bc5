"""Choosing between an operation's plain PyTorch definition and its fused kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ultramem.errors import UltraMemError

Backend = Literal["auto", "naive", "fused"]

# Triton's interpreter runs kernels on the CPU, for tests. Triton reads the variable when it is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
HAS_KERNELS = find_spec("triton") is not None and (_INTERPRETED or bool(torch.version.cuda or torch.version.hip))

_backend: Backend = "auto"


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Fix the backend of every operation inside a `with` block, in all threads.

    `auto`, the default, takes the fused kernel where there is one that supports the arguments; `naive` always
    takes plain PyTorch; `fused` raises where there is no kernel.

    Raises:
        UltraMemError: there is no such backend.
    """
    global _backend
    if backend not in get_args(Backend):
        raise UltraMemError(f"backend {backend!r}: must be one of {', '.join(get_args(Backend))}")
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


def can_run_kernels(tensor: Tensor) -> bool:
    """Whether Triton kernels run where the tensor is: on GPUs, and in the interpreter where that is asked for."""
    interpreted = _INTERPRETED and _backend == "fused" and tensor.device.type == "cpu"
    return HAS_KERNELS and (tensor.is_cuda or interpreted)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which to compute with a tensor: autocast's where that is on, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


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
        if _backend == "naive":
            return self.naive(*args, **kwargs)
        if self._fused is not None and self._supports(*args, **kwargs):
            return self._fused(*args, **kwargs)
        if _backend == "fused":
            raise UltraMemError(f"{self.__name__} has no fused kernel for these arguments; use the backend 'auto'")
        return self.naive(*args, **kwargs)


class FusedOperator:
    """Kernels with their gradient, as a torch operator that compilers and dispatch modes see.

    Elsewhere the kernels are called directly: an operator written in Python costs more time than they do.

    Args:
        name: of the operator.
        forward: launches the kernels; annotated as `torch.library.custom_op` wants it.
        fake: returns empty tensors as `forward` does.
        backward: launches the kernels of the gradient, likewise.
        backward_fake: returns empty tensors as `backward` does.
        backward_operator: what the operator of the gradient calls, if not `backward`.
        save: `(ctx, inputs, output)`, what `backward` needs.
        gradients: `(backward, ctx, *output_gradients)`, a gradient or None for each input.
        backward_tags: of the operator of the gradient.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        backward: Callable[..., Any],
        backward_fake: Callable[..., Any],
        save: Callable[..., None],
        gradients: Callable[..., tuple[Tensor | None, ...]],
        backward_operator: Callable[..., Any] | None = None,
        backward_tags: tuple[torch.Tag, ...] = (),
    ) -> None:
        self._operator = torch.library.custom_op(f"ultramem::{name}", forward, mutates_args=())
        self._operator.register_fake(fake)
        of_gradient = torch.library.custom_op(
            f"ultramem::{name}_backward", backward_operator or backward, mutates_args=(), tags=backward_tags
        )
        of_gradient.register_fake(backward_fake)
        self._operator.register_autograd(partial(gradients, of_gradient), setup_context=save)
        methods = {
            "forward": lambda ctx, *inputs: _forward_and_save(forward, save, ctx, inputs),
            "backward": once_differentiable(partial(gradients, backward)),
        }
        self._function: Any = type(
            name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()}
        )

    def __call__(self, *args: Any) -> Any:
        seen = torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not _is_plain(args[0])
        return self._operator(*args) if seen else self._function.apply(*args)


# A `setup_context` of its own would cost an inspection of signatures at every call.
def _forward_and_save(forward: Callable[..., Any], save: Callable[..., None], ctx: Any, inputs: tuple[Any, ...]) -> Any:
    output = forward(*inputs)
    save(ctx, inputs, output)
    return output


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)
