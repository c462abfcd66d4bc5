"""What a lookup is asked for, and what its backward pass knows of the table's gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Reads(NamedTuple):
    """Which rows tokens read, and what weighs them.

    UltraMem (arXiv:2411.12364), section 3.2 (MCS, IVE), UltraMemV2 (arXiv:2508.18756), section 3: core c weighs the
    c-th slice of the value; the product with the pre-value, through `pre_activation`, weighs all of it.

    Attributes:
        rows: (tokens, k), int64, row numbers of the table.
        scores: (tokens, k, cores), floating point.
        pre_input: (tokens, pre_value_dim), or None for a lookup without pre-values.
        pre_activation: of the products with the pre-values: None, `gelu` or `silu`.
        virtual_copies: (tokens, k), int64, the virtual copy that each row was chosen in; their sums stand side by side.
            None sums all rows together.
        num_virtual_copies: how many there are, with `virtual_copies`.
    """

    rows: Tensor
    scores: Tensor
    pre_input: Tensor | None = None
    pre_activation: str | None = None
    virtual_copies: Tensor | None = None
    num_virtual_copies: int = 1

    @property
    def sums(self) -> int:
        """How many sums of values a token gets."""
        return 1 if self.virtual_copies is None else self.num_virtual_copies


class Products(NamedTuple):
    """What a fused lookup's backward pass knows of the table's gradient.

    The gradient of row `rows[t, k]`, in core c's slice of the values, gains `weights[t, k, c] * gradients[t]` of the
    row's virtual copy; in the pre-values `pre_weights[t, k] * pre_inputs[t]`.

    Attributes:
        rows: (tokens, k), int64.
        virtual_copies: (tokens, k), int64, or None.
        weights: (tokens, k, cores), float32.
        gradients: (tokens, virtual copies * value_dim), gradient of the lookup's result.
        pre_weights, pre_inputs: (tokens, k), float32, and (tokens, pre_value_dim), or None.
    """

    rows: Tensor
    virtual_copies: Tensor | None
    weights: Tensor
    gradients: Tensor
    pre_weights: Tensor | None
    pre_inputs: Tensor | None


class RowStep(NamedTuple):
    """A table's values or pre-values, and what a step of the row-wise optimizer (`step_rows`) needs to know.

    Attributes:
        parameter: (rows, width), changed in place.
        squares: (rows,), float32, decayed mean squares, changed in place.
        steps: (rows,), float32, steps of each row so far, changed in place.
        means: (rows,), float32, mean squares of this step's gradient; written where it is not zero.
        copy: (rows, width), the copy that is computed in, rows at any distance, changed like the parameter; or None.
        lr, beta, eps: of the optimizer.
        seed: of `rounding.random_bits`, by which a parameter in bfloat16 is rounded; None rounds to the nearest.
    """

    parameter: Tensor
    squares: Tensor
    steps: Tensor
    means: Tensor
    copy: Tensor | None
    lr: float
    beta: float
    eps: float
    seed: int | None = None

    def options(self) -> tuple[int, float, float, float]:
        """What kernels need besides the tensors: distance of the copy's rows, learning rate, log of beta, epsilon."""
        stride = 0 if self.copy is None else self.copy.stride(0)
        return stride, self.lr, math.log(self.beta) if self.beta else -math.inf, self.eps
