"""Tucker-decomposed retrieval with Triton kernels: one batched product, then everything on chip."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ultramem.ops.backend import KERNEL_DTYPES, autocast_dtype, can_run_kernels
from ultramem.ops.kernels.axis_scores import axis_scores, axis_scores_backward, pad_keys
from ultramem.ops.kernels.candidates import MAX_KEYS
from ultramem.ops.kernels.cells import MAX_CANDIDATES, best_cells
from ultramem.ops.kernels.gradients import best_cells_backward
from ultramem.ops.kernels.operators import FusedOperator

_MAX_RANK = 4


def supports(queries: Tensor, keys: Tensor, cores: Tensor, u: Tensor, t: Tensor, k: int, axis_k: int) -> bool:
    """Whether there are kernels for these arguments."""
    return (
        can_run_kernels(queries)
        and autocast_dtype(queries) in KERNEL_DTYPES
        and keys.shape[2] <= MAX_KEYS
        and max(k, axis_k) <= MAX_CANDIDATES
        and keys.shape[3] <= _MAX_RANK
    )


def tucker_topk(
    queries: Tensor, keys: Tensor, cores: Tensor, u: Tensor, t: Tensor, k: int, axis_k: int
) -> tuple[Tensor, Tensor]:
    """As the definition in `naive.py`. Scores are float32; under autocast, products are in its dtype."""
    dtype = autocast_dtype(queries)
    padded = pad_keys(keys.to(dtype).permute(1, 3, 0, 2, 4))
    wide = (part.float().contiguous() for part in (cores, u.detach(), t.detach()))
    scores, indices, *_ = _tucker_topk(queries.to(dtype), padded, *wide, keys.shape[2], k, axis_k)
    return scores, indices


def _forward(
    queries: Tensor, padded: Tensor, cores: Tensor, u: Tensor, t: Tensor, keys: int, k: int, axis_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`padded` (2, rank, heads, padded keys, key_dim) are the keys, of which each axis has `keys`."""
    scores = axis_scores(queries, padded.flatten(0, 1)).unflatten(0, queries.shape[1:3])
    cells = best_cells(scores, keys, k, axis_k, cores, u, t)
    return cells.scores, cells.indices, cells.keys, cells.chosen_scores


def _fake(
    queries: Tensor, padded: Tensor, cores: Tensor, u: Tensor, t: Tensor, keys: int, k: int, axis_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, (rank, heads) = queries.shape[0], padded.shape[1:3]
    return (
        queries.new_empty((tokens, heads, k, cores.shape[0]), dtype=torch.float32),
        queries.new_empty((tokens, heads, k), dtype=torch.int64),
        queries.new_empty((tokens, heads, 2, k), dtype=torch.int32),
        queries.new_empty((tokens, heads, 2, rank, k)),
    )


def _backward(
    gradient: Tensor, queries: Tensor, padded: Tensor, cores: Tensor, chosen_keys: Tensor, chosen_scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = padded.new_empty((*padded.shape[:2], queries.shape[0], *padded.shape[2:4]))
    core_gradients = best_cells_backward(gradient.contiguous(), chosen_keys, chosen_scores, gradients, cores)
    assert core_gradients is not None
    query_gradients, key_gradients, _ = _backward_fake(gradient, queries, padded, cores, chosen_keys, chosen_scores)
    by_batch, padded_by_batch, keys_by_batch = (part.flatten(0, 1) for part in (gradients, padded, key_gradients))
    axis_scores_backward(by_batch, queries, padded_by_batch, query_gradients, keys_by_batch)
    return query_gradients, key_gradients, core_gradients


def _backward_fake(
    gradient: Tensor, queries: Tensor, padded: Tensor, cores: Tensor, chosen_keys: Tensor, chosen_scores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    new = partial(torch.empty_like, memory_format=torch.contiguous_format)
    return new(queries), new(padded), new(cores)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries, padded, cores, *_ = inputs
    _, indices, chosen_keys, chosen_scores = output
    ctx.mark_non_differentiable(indices, chosen_keys, chosen_scores)
    ctx.save_for_backward(queries, padded, cores, chosen_keys, chosen_scores)


def _gradients(backward: Callable[..., Any], ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*backward(gradient, *ctx.saved_tensors), *(None,) * 5)


_tucker_topk = FusedOperator("tucker_topk", _forward, _fake, _backward, _backward_fake, _save, _gradients)
