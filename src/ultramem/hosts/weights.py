"""Checks of loaded weights, the same for all hosts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from ultramem.errors import UltraMemError


def check_finite_weights(weights: Mapping[str, Tensor], source: Path) -> None:
    """Check that weights are finite numbers.

    Args:
        weights: tensors by name; of sharded ones this process's part is checked.
        source: what they were loaded from, for the error.

    Raises:
        UltraMemError: a weight is NaN or infinite.
    """
    for name, tensor in weights.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        # The sum is quick, and finite unless a weight is not, or all are huge.
        if local.is_floating_point() and not local.sum().isfinite() and not local.isfinite().all():
            raise UltraMemError(
                f"{source} has weights that are not finite, in {name}: its training had diverged, or it is damaged; "
                "use an earlier checkpoint: RUN/stepN, and for training --from-checkpoint stepN"
            )
