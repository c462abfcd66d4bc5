"""Registering kernels, with their gradient, as operators of torch; and objects, for operators to find by number."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class FusedOperator:
    """Kernels with their gradient, as a torch operator that compilers and dispatch modes see.

    Elsewhere the kernels are called directly: an operator written in Python costs more time than they do.

    Args:
        name: of the operator.
        forward, backward: launch the kernels, and those of the gradient; annotated as `torch.library.custom_op` wants.
        fake, backward_fake: return empty tensors as they do.
        save: `(ctx, inputs, output)`, what `backward` needs.
        gradients: `(backward, ctx, *output_gradients)`, a gradient or None for each input.
        backward_operator: what the operator of the gradient calls, if not `backward`.
        backward_tags: of the operator of the gradient.
        schema, backward_schema: of the operators, where `forward` and `backward` have no annotations to tell.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        backward: Callable[..., Any],
        backward_fake: Callable[..., Any],
        save: Callable[..., None],
        gradients: Callable[..., tuple[Tensor | None, ...]],
        *,
        backward_operator: Callable[..., Any] | None = None,
        backward_tags: tuple[torch.Tag, ...] = (),
        schema: str | None = None,
        backward_schema: str | None = None,
    ) -> None:
        self._operator = torch.library.custom_op(f"ultramem::{name}", forward, mutates_args=(), schema=schema)
        self._operator.register_fake(fake)
        of_gradient = torch.library.custom_op(
            f"ultramem::{name}_backward",
            backward_operator or backward,
            mutates_args=(),
            schema=backward_schema,
            tags=backward_tags,
        )
        of_gradient.register_fake(backward_fake)
        self._operator.register_autograd(partial(gradients, of_gradient), setup_context=save)

        def forward_and_save(ctx: Any, *inputs: Any) -> Any:  # `setup_context` would inspect signatures at every call
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        methods = {"forward": forward_and_save, "backward": once_differentiable(partial(gradients, backward))}
        static = {key: staticmethod(method) for key, method in methods.items()}
        self._function: Any = type(name, (torch.autograd.Function,), static)

    def __call__(self, *args: Any) -> Any:
        return self._operator(*args) if seen_by_compilers(args[0]) else self._function.apply(*args)


def seen_by_compilers(tensor: Tensor) -> bool:
    """Whether a compiler or dispatch mode, or the kind of tensor itself, sees the operators that are called with it."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not plain


# Operators take only tensors and plain values: Python objects go by number.
_numbers = itertools.count()
_objects: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(*things: Any) -> Tensor:
    """Numbers (things,) of objects, int64 on the CPU; they find the objects as long as these live."""
    found = [next(_numbers) for _ in things]
    _objects.update(zip(found, things, strict=True))
    with torch.inference_mode(False):  # a tensor, so that a compiler makes one program for all objects
        return torch.tensor(found, device="cpu")


def find(numbers: Tensor | None, which: int) -> Any:
    """The object of one of the numbers; None if there are no numbers, or the object is gone."""
    return None if numbers is None else _objects.get(numbers.tolist()[which])
