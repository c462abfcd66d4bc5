"""Tucker-decomposed retrieval in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ultramem.ops.largest import largest


def tucker_topk(
    queries: Tensor, keys: Tensor, cores: Tensor, u: Tensor, t: Tensor, k: int, axis_k: int
) -> tuple[Tensor, Tensor]:
    """The definition; arguments and result as in `ultramem.ops.tucker_topk.tucker_topk`."""
    return best_cells(axis_scores(queries, keys), cores, u, t, k, axis_k)


def axis_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Row and column scores, (2, tokens, heads, rank, keys); arguments as in `tucker_topk`."""
    tokens = queries.shape[0]
    if torch.compiler.is_compiling() and queries.device.type == "cpu" and tokens == 1:
        # Of a single token inductor makes a reduction that writes beyond its result's end (pytorch/pytorch#196681).
        queries = queries.expand(2, -1, -1, -1)
    return torch.einsum("txrd,hxnrd->xthrn", queries, keys)[:, :tokens]


def best_cells(scores: Tensor, cores: Tensor, u: Tensor, t: Tensor, k: int, axis_k: int) -> tuple[Tensor, Tensor]:
    """`tucker_topk` from row and column scores (2, tokens, heads, rank, keys)."""
    keys = scores.shape[-1]
    scores = scores.movedim(3, 1)  # (2, rank, tokens, heads, keys), as the product lies in memory
    with torch.no_grad():
        directions = torch.stack([u, t]).mT[:, :, None, :, None]
        candidates = largest((scores * directions).sum(1), axis_k)
        rows, columns = _at(scores, candidates).unbind()
        weighted_rows = torch.einsum("rthi,hrs->this", rows, cores.sum(0, dtype=scores.dtype))
        cells = largest((weighted_rows @ columns.movedim(0, 2)).flatten(-2), k)
        row_places = cells // axis_k
        chosen = candidates.gather(-1, torch.stack([row_places, cells - row_places * axis_k]))
    wide = torch.promote_types(scores.dtype, torch.float32)
    with torch.autocast(scores.device.type, enabled=False):
        rows, columns = _at(scores, chosen).to(wide).unbind()
        cell_scores = (torch.einsum("chrs,rthk->csthk", cores.to(wide), rows) * columns).sum(1)
    return cell_scores.movedim(0, 3), chosen[0] * keys + chosen[1]


def _at(scores: Tensor, indices: Tensor) -> Tensor:
    """Scores (2, rank, tokens, heads, keys) at indices (2, tokens, heads, k), as (2, rank, tokens, heads, k)."""
    return scores.gather(-1, indices.unsqueeze(1).expand(-1, scores.shape[1], -1, -1, -1))
