"""Registering kernels, with their gradient, as operators of torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


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
        schema: of the operator, where `forward` has no annotations to tell.
        backward_schema: of the operator of the gradient, likewise.
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
