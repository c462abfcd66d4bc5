"""What the tests of kernels have in common."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

if find_spec("hypothesis") is None:  # on a machine with a GPU there may be little else than torch and pytest
    collect_ignore_glob = ["*/test_naive_*"]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN and huge integers, as it may anywhere but in a test."""

    def poisoned(make: object) -> object:
        def made(*args: object, **kwargs: object) -> Tensor:
            tensor: Tensor = make(*args, **kwargs)  # type: ignore[operator]
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)

        return made

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
