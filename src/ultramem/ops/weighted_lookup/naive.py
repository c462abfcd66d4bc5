"""Weighted sums of table rows in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem.ops.weighted_lookup.reads import Reads, RowStep
from ultramem.ops.weighted_lookup.rounding import random_bits, round_stochastically

_ROWS_AT_ONCE = 2**15  # whose random bits are in memory together
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda x: x, "gelu": F.gelu, "silu": F.silu}


def weighted_lookup(reads: Reads, values: Tensor, pre_values: Tensor | None = None) -> Tensor:
    """As `ultramem.ops.weighted_lookup.weighted_lookup`, whose definition this is."""
    if reads.pre_input is None:
        return weighted_sum(reads, F.embedding(reads.rows, values))
    assert pre_values is not None
    return weighted_sum(reads, F.embedding(reads.rows, values), F.embedding(reads.rows, pre_values))


def weighted_sum(reads: Reads, values: Tensor, pre_values: Tensor | None = None) -> Tensor:
    """The lookup's sums (tokens, virtual copies * value_dim), in the values' dtype, of rows that were gathered already.

    The rows' values are (tokens, k, value_dim); with `reads.pre_input`, their pre-values (tokens, k, pre_value_dim).
    """
    scores, cores = reads.scores, reads.scores.shape[-1]
    if reads.pre_input is not None:
        assert pre_values is not None
        products = torch.einsum("tp,tkp->tk", reads.pre_input, pre_values.to(reads.pre_input.dtype))
        scores = scores * ACTIVATIONS[reads.pre_activation](products).unsqueeze(-1)
    weights = scores.unsqueeze(2)
    if reads.virtual_copies is not None:
        places = reads.virtual_copies[..., None, None].expand(-1, -1, -1, cores)
        weights = scores.new_zeros(*reads.rows.shape, reads.num_virtual_copies, cores).scatter(2, places, weights)
    # Each core weighs the whole value, of which its slice is kept: all slices in one product, nothing rearranged.
    sums = weights.flatten(2).transpose(1, 2).to(values.dtype) @ values
    slices = sums.unflatten(1, (-1, cores)).unflatten(-1, (cores, -1))
    return slices.diagonal(dim1=2, dim2=3).transpose(-1, -2).flatten(1)


def step_rows(step: RowStep, gradient: Tensor) -> None:
    """One step of the row-wise optimizer, in place.

    A row r whose gradient g, of width D, is not zero:

        s_r ← β s_r + (1 − β) |g|² / D,  n_r ← n_r + 1,  row ← row − lr · g / (sqrt(s_r / (1 − β^n_r)) + eps)

    Other rows, and their numbers, stay as they are. This is Adam (arXiv:1412.6980) without its first moment and with
    one second moment for each row, whose bias is corrected by the number of the row's own steps. With a seed, the new
    row is computed in float32 and rounded stochastically to bfloat16 (`rounding.py`).

    Args:
        step: parameter, s_r (`squares`), n_r (`steps`), and the optimizer's options.
        gradient: (rows, D).
    """
    means = torch.linalg.vector_norm(gradient, dim=1, dtype=step.squares.dtype).square() / gradient.shape[1]
    read = means > 0
    step.means.copy_(means)
    step.steps.add_(read)
    step.squares.copy_(torch.where(read, step.squares.lerp(means, 1 - step.beta), step.squares))
    corrected = step.squares / (1 - step.beta ** step.steps.clamp(min=1))
    factors = torch.where(read, step.lr / (corrected.sqrt() + step.eps), 0)
    if step.seed is None:
        step.parameter.addcmul_(gradient, factors.to(step.parameter.dtype).unsqueeze(1), value=-1)
    else:
        for rows in read.nonzero().squeeze(1).split(_ROWS_AT_ONCE):
            new = step.parameter[rows].float() - factors[rows].unsqueeze(1) * gradient[rows]
            bits = random_bits(step.seed, rows, step.steps[rows], new.shape[1])
            step.parameter[rows] = round_stochastically(new, bits)
    if step.copy is not None:
        step.copy.copy_(step.parameter)
