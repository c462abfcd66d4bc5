"""Kernels run on the GPU if there is one, and otherwise in Triton's interpreter."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

if find_spec("hypothesis") is not None:  # on a machine with a GPU there may be little else than torch and pytest
    from hypothesis import HealthCheck, settings

    of_both = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
    settings.register_profile("fast", max_examples=50, derandomize=True, **of_both)
    settings.register_profile("thorough", max_examples=500, **of_both)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: before all tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_triton, no_gpu = find_spec("triton") is None, not torch.cuda.is_available()
    for item in items:
        if no_triton and item.get_closest_marker("kernels"):
            item.add_marker(pytest.mark.skip(reason="the kernels need Triton, which is not installed"))
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator(device: torch.device) -> torch.Generator:
    """Other numbers in each run; a failure shows the seed, by which to repeat it."""
    seed = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"seed {seed}: repeat with TEST_SEED={seed}")
    return torch.Generator(device).manual_seed(seed)


@pytest.fixture
def fused() -> Iterator[None]:
    """All operations take their kernels, or raise."""
    from ultramem.ops import use_backend

    with use_backend("fused"):
        yield


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of few reads in the interpreter, which goes through all places of a chunk, slowly."""
    if request.node.get_closest_marker("kernels") and not torch.cuda.is_available():
        from ultramem.ops.weighted_lookup import table_gradient

        monkeypatch.setattr(table_gradient, "_CHUNK", 16)
