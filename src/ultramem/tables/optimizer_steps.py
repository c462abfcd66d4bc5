"""Following the steps of PyTorch's optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

T = TypeVar("T")


def after_each_step(owner: T, action: Callable[[T, Optimizer], None]) -> None:
    """Call `action(owner, optimizer)` after each step of any optimizer of PyTorch, as long as the owner lives."""
    reference = weakref.ref(owner)

    def follow(optimizer: Optimizer, *_: Any) -> None:
        alive = reference()
        if alive is not None:
            action(alive, optimizer)

    weakref.finalize(owner, register_optimizer_step_post_hook(follow).remove)
