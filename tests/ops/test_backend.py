"""The choice between plain PyTorch and a fused kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ultramem import UltraMemError
from ultramem.ops import product_key_topk, use_backend
from ultramem.ops.backend import Operation, can_run_kernels


@pytest.fixture
def double() -> Operation:
    """Doubles; its stand-in for a kernel takes float32 only and marks its result by a minus sign."""

    def naive(x: Tensor) -> Tensor:
        """Twice x."""
        return 2 * x

    operation = Operation(naive)
    operation.register_fused(lambda x: -2 * x, lambda x: x.dtype == torch.float32)
    return operation


def test_auto_takes_the_kernel_where_it_is_supported(double: Operation) -> None:
    assert double(torch.ones(())) == -2
    assert double(torch.ones((), dtype=torch.float64)) == 2


def test_naive_and_fused(double: Operation) -> None:
    with use_backend("naive"):
        assert double(torch.ones(())) == 2
        with use_backend("fused"):
            assert double(torch.ones(())) == -2
        assert double(torch.ones(())) == 2
    assert double(torch.ones(())) == -2


def test_fused_without_a_kernel_raises(double: Operation) -> None:
    with use_backend("fused"), pytest.raises(UltraMemError, match=r"naive has no fused kernel.*'auto'"):
        double(torch.ones((), dtype=torch.float64))
    with use_backend("fused"), pytest.raises(UltraMemError, match="product_key_topk has no fused kernel"):
        product_key_topk(torch.ones(1, 1, 2, 3, dtype=torch.float64), torch.ones(1, 2, 4, 3, dtype=torch.float64), 1)


def test_the_backend_is_restored_after_an_error(double: Operation) -> None:
    with pytest.raises(ZeroDivisionError), use_backend("naive"):
        raise ZeroDivisionError
    assert double(torch.ones(())) == -2


def test_unknown_backend() -> None:
    with (
        pytest.raises(UltraMemError, match="backend 'triton': must be one of auto, naive, fused"),
        use_backend("triton"),
    ):  # type: ignore[arg-type]
        pass


def test_keeps_name_and_documentation(double: Operation) -> None:
    assert (double.__name__, double.__doc__) == ("naive", "Twice x.")


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
