"""Comparing tensors of a narrow dtype with what they ought to be."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_near(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Within a part of each expected value, or of four times their root mean square; both tensors are there."""
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    scale = 4 * expected.square().mean().sqrt().item() if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)
