"""What tables need of PyTorch that its documentation does not promise: all of it is here.

Tested on PyTorch 2.11 and 2.13.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    """Address and version of a tensor. They differ after each change that PyTorch sees."""
    return tensor.data_ptr(), tensor._version


def take_gradient(node: Any) -> Tensor | None:
    """Take the gradient that a parameter has already, if what `node` is given in this pass would be added to that.

    So micro-batches add to one buffer, without another one of the table's size and a pass over both.

    Args:
        node: of the autograd graph, to which the parameter's gradient goes, or None.
    """
    parameter = getattr(node, "variable", None)
    if parameter is None or parameter.grad is None or parameter._backward_hooks:
        return None
    try:
        accumulates: bool = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # what is asked for is the gradient itself
        return None
    if not accumulates:
        return None
    gradient: Tensor = parameter.grad
    parameter.grad = None
    return gradient
