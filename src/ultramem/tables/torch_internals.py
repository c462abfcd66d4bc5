"""What tables need of PyTorch's engine, optimizers and sharding; most of it, its documentation does not promise.

Tested on PyTorch 2.11 and 2.13.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

T = TypeVar("T")

NO_BACKWARD_PASS = -1


def current_backward_pass() -> int:
    """Number of the backward pass in which this thread is, which no other has; `NO_BACKWARD_PASS` outside of one."""
    number: int = torch._C._current_graph_task_id()
    return number


def keep_until_it_ends(thing: object) -> None:
    """Hold a reference until the backward pass in which this thread is has ended, or failed."""

    def let_go(_: object = thing) -> None:
        pass

    torch.autograd.Variable._execution_engine.queue_callback(let_go)


def describe_contents(tensor: Tensor) -> tuple[int, int]:
    """Address and version of a tensor. They differ after each change that PyTorch sees, of which tensors that were made
    in inference mode have none.
    """
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def accumulates(node: Any) -> bool:
    """Whether what `node` is given in this backward pass is added to a parameter's gradient, with no hook between.

    Args:
        node: of the autograd graph, to which the gradient of a table goes, or None.
    """
    parameter = getattr(node, "variable", None)
    if parameter is None or parameter._backward_hooks:
        return False
    try:
        executed: bool = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # what is asked for is the gradient itself
        return False
    return executed


def take_gradient(node: Any) -> Tensor | None:
    """Take the gradient that a parameter has already, if what `node` is given in this pass would be added to that.

    So micro-batches add to one buffer, without another one of the table's size and a pass over both.
    """
    if not accumulates(node):
        return None
    gradient: Tensor | None = node.variable.grad
    node.variable.grad = None
    return gradient


def after_each_step(owner: T, action: Callable[[T, Optimizer], None]) -> None:
    """Call `action(owner, optimizer)` after each step of any optimizer of PyTorch, as long as the owner lives."""
    reference = weakref.ref(owner)

    def follow(optimizer: Optimizer, *_: Any) -> None:
        alive = reference()
        if alive is not None:
            action(alive, optimizer)

    weakref.finalize(owner, register_optimizer_step_post_hook(follow).remove)


def first_row(parameter: Tensor) -> int:
    """Number of the first row that this process has; 0 of a parameter that is not sharded."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offsets[0]
