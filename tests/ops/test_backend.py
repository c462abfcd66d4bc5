"""The choice between plain PyTorch and a fused kernel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ultramem import UltraMemError
from ultramem.ops import product_key_topk, tucker_topk, use_backend
from ultramem.ops.backend import can_run_kernels, takes_kernels


def double(x: Tensor) -> Tensor:
    """Twice x; the stand-in for a kernel takes float32 only and marks its result by a minus sign."""
    return -2 * x if takes_kernels("double", x.dtype == torch.float32) else 2 * x


def test_auto_takes_the_kernel_where_it_is_supported() -> None:
    assert double(torch.ones(())) == -2
    assert double(torch.ones((), dtype=torch.float64)) == 2


def test_naive_and_fused() -> None:
    with use_backend("naive"):
        assert double(torch.ones(())) == 2
        with use_backend("fused"):
            assert double(torch.ones(())) == -2
        assert double(torch.ones(())) == 2
    assert double(torch.ones(())) == -2


def test_fused_without_a_kernel_raises() -> None:
    with use_backend("fused"), pytest.raises(UltraMemError, match=r"double has no fused kernel.*'auto'"):
        double(torch.ones((), dtype=torch.float64))


def test_the_backend_is_restored_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), use_backend("naive"):
        raise ZeroDivisionError
    assert double(torch.ones(())) == -2


OPERATIONS = [product_key_topk, tucker_topk]


def operation_of(package: ModuleType) -> Callable[..., Any]:
    """The function of the package's own name."""
    operation: Callable[..., Any] = getattr(package, package.__name__.rpartition(".")[2])
    return operation


def arguments_of(package: ModuleType, dtype: torch.dtype) -> tuple[Any, ...]:
    if package is product_key_topk:
        return torch.ones(1, 1, 2, 3, dtype=dtype), torch.ones(1, 2, 4, 3, dtype=dtype), 1
    vector = torch.ones(1, 1)
    return torch.ones(1, 2, 1, 3, dtype=dtype), torch.ones(1, 2, 4, 1, 3, dtype=dtype), vector, vector, vector, 1, 1


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of each operation's definition and kernels, functions that return their name; kernels want float32."""
    for package in OPERATIONS:
        name = operation_of(package).__name__
        naive = {name: lambda *arguments: "naive"}
        fused = {name: lambda *arguments: "fused", "supports": lambda x, *arguments: x.dtype == torch.float32}
        monkeypatch.setattr(package, "HAS_KERNELS", True)
        monkeypatch.setattr(package, "naive", SimpleNamespace(**naive))
        monkeypatch.setattr(package, "fused", SimpleNamespace(**fused), raising=False)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("package", OPERATIONS)
def test_operations_choose(package: ModuleType) -> None:
    operation = operation_of(package)
    narrow, wide = (arguments_of(package, dtype) for dtype in (torch.float32, torch.float64))
    assert (operation(*narrow), operation(*wide)) == ("fused", "naive")
    with use_backend("naive"):
        assert operation(*narrow) == "naive"
    with use_backend("fused"):
        assert operation(*narrow) == "fused"


@pytest.mark.parametrize("package", OPERATIONS)
def test_operations_without_a_kernel_raise(package: ModuleType) -> None:
    operation = operation_of(package)
    with use_backend("fused"), pytest.raises(UltraMemError, match=f"{operation.__name__} has no fused kernel"):
        operation(*arguments_of(package, torch.float64))


def test_unknown_backend() -> None:
    with (
        pytest.raises(UltraMemError, match="backend='triton': must be one of auto, naive, fused"),
        use_backend("triton"),
    ):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("package", OPERATIONS)
def test_operations_are_documented_functions(package: ModuleType) -> None:
    operation = operation_of(package)
    assert operation.__module__ == package.__name__
    assert operation.__doc__ is not None
    assert "Args:" in operation.__doc__


def test_kernels_are_only_for_gpus_unless_asked_for() -> None:
    """Triton's interpreter would take any tensor on the CPU, slowly."""
    assert not can_run_kernels(torch.ones(1))
    with use_backend("naive"):
        assert not can_run_kernels(torch.ones(1))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it fails

import torch
from ultramem import Memory, MemoryConfig, UltraMemError
from ultramem.ops import use_backend

layer = Memory(MemoryConfig(num_keys=8, key_dim=8, value_dim=16, top_k=4), d_model=16, num_blocks=1).layers[0]
layer(torch.randn(2, 16)).sum().backward()
try:
    with use_backend("fused"):
        layer(torch.randn(2, 16))
except UltraMemError as error:
    print(error)
"""


def test_without_triton() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert run.stdout.startswith("tucker_topk has no fused kernel"), run.stderr
