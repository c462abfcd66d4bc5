"""Python objects that operators find by number, as operators take only tensors and plain values."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_numbers = itertools.count()
_objects: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(*things: Any) -> Tensor:
    """Numbers (things,) of objects, int64 on the CPU; they find the objects as long as these live.

    A tensor, so that a compiler makes one program for all objects.
    """
    found = [next(_numbers) for _ in things]
    _objects.update(zip(found, things, strict=True))
    with torch.inference_mode(False):
        return torch.tensor(found, device="cpu")


def find(numbers: Tensor | None, which: int) -> Any:
    """The object of one of the numbers; None if there are no numbers, or the object is gone."""
    return None if numbers is None else _objects.get(numbers.tolist()[which])
