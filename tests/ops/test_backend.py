"""The choice between plain PyTorch and a fused kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ultramem import UltraMemError
from ultramem.ops import product_key_topk, use_backend
from ultramem.ops.backend import Operation


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
        product_key_topk(torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64), 1)


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
