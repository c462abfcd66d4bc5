"""Product-key retrieval with Triton kernels: one batched product, then everything on chip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ultramem.ops.backend import KERNEL_DTYPES, autocast_dtype, can_run_kernels
from ultramem.ops.kernels.axis_scores import axis_scores, axis_scores_backward, pad_keys
from ultramem.ops.kernels.candidates import MAX_KEYS
from ultramem.ops.kernels.cells import MAX_CANDIDATES, best_cells
from ultramem.ops.kernels.gradients import best_cells_backward
from ultramem.ops.kernels.operators import FusedOperator


def supports(queries: Tensor, keys: Tensor, k: int) -> bool:
    """Whether there are kernels for these arguments."""
    return (
        can_run_kernels(queries)
        and autocast_dtype(queries) in KERNEL_DTYPES
        and keys.shape[2] <= MAX_KEYS
        and k <= MAX_CANDIDATES
    )


def product_key_topk(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As the definition in `naive.py`. Scores are float32; under autocast, products are in its dtype."""
    dtype = autocast_dtype(queries)
    scores, indices, _ = _product_key_topk(queries.to(dtype), pad_keys(keys.to(dtype)), keys.shape[2], k)
    return scores, indices


def _forward(queries: Tensor, padded: Tensor, keys: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`padded` (heads, 2, padded keys, key_dim) are the keys, of which each axis has `keys`."""
    scores = axis_scores(queries, padded.flatten(0, 1).unsqueeze(1))
    cells = best_cells(_by_axis(scores, padded.shape[0]), keys, k, min(k, keys))
    return cells.scores.squeeze(-1), cells.indices, cells.keys


def _fake(queries: Tensor, padded: Tensor, keys: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads = queries.shape[:2]
    return (
        queries.new_empty((tokens, heads, k), dtype=torch.float32),
        queries.new_empty((tokens, heads, k), dtype=torch.int64),
        queries.new_empty((tokens, heads, 2, k), dtype=torch.int32),
    )


def _backward(gradient: Tensor, queries: Tensor, padded: Tensor, chosen_keys: Tensor) -> tuple[Tensor, Tensor]:
    heads = padded.shape[0]
    gradients = padded.new_empty(heads * 2, queries.shape[0], 1, padded.shape[2])
    score_gradients, no_scores = gradient.contiguous().unsqueeze(-1), gradient.new_empty(0)
    best_cells_backward(score_gradients, chosen_keys, no_scores, _by_axis(gradients, heads), None)
    query_gradients, key_gradients = _backward_fake(gradient, queries, padded, chosen_keys)
    by_batch, gradients_by_batch = (part.flatten(0, 1).unsqueeze(1) for part in (padded, key_gradients))
    axis_scores_backward(gradients, queries, by_batch, query_gradients, gradients_by_batch)
    return query_gradients, key_gradients


def _backward_fake(gradient: Tensor, queries: Tensor, padded: Tensor, chosen_keys: Tensor) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(queries, memory_format=contiguous), torch.empty_like(padded, memory_format=contiguous)


def _by_axis(scores: Tensor, heads: int) -> Tensor:
    """A view of scores (heads * 2, tokens, 1, padded keys) as (2, 1, tokens, heads, padded keys)."""
    return scores.unflatten(0, (heads, 2)).permute(1, 3, 2, 0, 4)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, padded, *_ = inputs
    _, indices, chosen_keys = output
    ctx.mark_non_differentiable(indices, chosen_keys)
    ctx.save_for_backward(queries, padded, chosen_keys)


def _gradients(backward: Callable[..., Any], ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*backward(gradient, *ctx.saved_tensors), None, None)


_product_key_topk = FusedOperator("product_key_topk", _forward, _fake, _backward, _backward_fake, _save, _gradients)
