"""Memory layers with Tucker-decomposed scores: UltraMem and UltraMemV2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ultramem.config import MemoryConfig
from ultramem.layers.memory_layer import MemoryLayer, rms_norm
from ultramem.layers.product_key import balance_loss
from ultramem.layers.value_table import ValueTable
from ultramem.ops.tucker_topk import tucker_topk
from ultramem.ops.tucker_topk.naive import axis_scores


class TuckerMemory(MemoryLayer):
    """UltraMem (arXiv:2411.12364) and UltraMemV2 (arXiv:2508.18756), which differ in their configuration only.

    Heads share the queries and differ in their keys. `u` and `t` (heads, rank) are the leading singular vectors of
    each head's summed cores; they carry no gradient, and `refresh` follows the cores once per optimiser step.
    Arguments as for `MemoryLayer`.
    """

    u: Tensor
    t: Tensor
    shuffle: Tensor
    pre_proj: nn.Linear | None

    def __init__(self, config: MemoryConfig, d_model: int, table: ValueTable, **options: Any) -> None:
        self.queries_per_axis = config.tucker_rank if config.query_per_rank else 1
        super().__init__(config, d_model, table, num_queries=2 * self.queries_per_axis, **options)
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        heads, rank = config.heads, config.tucker_rank
        self.query_norm = nn.RMSNorm(config.key_dim, eps=config.norm_eps, **factory)
        self.key_norm = nn.RMSNorm(config.key_dim, eps=config.norm_eps, **factory)
        self.keys = nn.Parameter(torch.empty(heads, 2, self.axis_keys, config.key_dim, rank, **factory))
        self.cores = nn.Parameter(torch.empty(config.cores, heads, rank, rank, **factory))
        if config.pre_value_dim:
            self.pre_proj = nn.Linear(d_model, config.pre_value_dim, bias=False, **factory)
        else:
            self.pre_proj = None
        self.output_proj = nn.Linear(config.output_width, d_model, bias=False, **factory)
        self.register_buffer("u", torch.zeros(heads, rank, **factory))
        self.register_buffer("t", torch.zeros(heads, rank, **factory))
        self.register_buffer("shuffle", torch.empty(self.axis_keys**2, dtype=torch.int64, device=options.get("device")))

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """As in `MemoryLayer`; the weights are the scores of each core."""
        config = self.config
        normed_queries, normed_keys = self.normed_queries(queries), self.normed_keys()
        axis_top_k = min(config.axis_top_k or config.top_k, self.axis_keys)
        scores, indices = tucker_topk(normed_queries, normed_keys, self.cores, self.u, self.t, config.top_k, axis_top_k)
        if self.training:
            self.auxiliary_loss = self._auxiliary_loss(normed_queries, normed_keys, axis_top_k)
        return scores.flatten(1, 2), indices.flatten(1)

    def normed_queries(self, queries: Tensor) -> Tensor:
        """Normalised row and column queries (tokens, 2, rank, key_dim) of queries (tokens, num_queries, key_dim).

        Without their gain: it multiplies the keys, of which there are fewer.
        """
        normed = rms_norm(queries, None, self.config.norm_eps)
        return normed.unflatten(1, (2, self.queries_per_axis)).expand(-1, -1, self.config.tucker_rank, -1)

    def normed_keys(self) -> Tensor:
        """Normalised row and column keys (heads, 2, axis_keys, rank, key_dim), with their gain and the queries'."""
        gain = self.key_norm.weight * self.query_norm.weight
        return rms_norm(self.keys.transpose(3, 4), gain, self.config.norm_eps)

    def locate(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Through the shuffle to virtual block and table row."""
        virtual = self.shuffle[indices]
        in_window = virtual if self.config.virtual_blocks == 1 else virtual % self.window_rows
        rows, table_rows = in_window + self.window_start, self.table.values.shape[0]
        rows = torch.where(rows < table_rows, rows, rows - table_rows)
        return rows, virtual // self.window_rows if self.config.value_projectors == "per_block" else None

    def lookup(self, x: Tensor, scores: Tensor, rows: Tensor, blocks: Tensor | None) -> Tensor:
        """Weighted sums (tokens, output_width) of the rows; x is (tokens, d_model)."""
        return self.table.lookup(
            scores,
            rows,
            None if self.pre_proj is None else self.pre_proj(x),
            pre_activation=self.config.pre_activation,
            blocks=blocks,
            num_blocks=self.config.virtual_blocks,
        )

    def project(self, looked_up: Tensor, x: Tensor) -> Tensor:
        """Project to the model's width."""
        return self.output_proj(looked_up)

    def refresh(self) -> None:
        """Recompute `u` and `t` from the cores; call once per optimiser step."""
        refresh_directions([self])

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        """(rank,) singular values of the summed cores, descending, mean over the heads."""
        return torch.linalg.svdvals(_summed(self.cores)).mean(0)

    def _auxiliary_loss(self, queries: Tensor, keys: Tensor, axis_top_k: int) -> Tensor | None:
        config = self.config
        losses = []
        if config.balance_coef:
            for scores, direction in zip(axis_scores(queries, keys), (self.u, self.t), strict=True):
                axis = torch.einsum("thrn,hr->thn", scores, direction.to(scores.dtype))
                losses.append(config.balance_coef * balance_loss(axis, axis_top_k))
        if config.tucker_penalty_coef:
            losses.append(config.tucker_penalty_coef * tucker_penalty(self.cores, config.tucker_penalty_threshold))
        return torch.stack(losses).sum() if losses else None


@torch.no_grad()
def refresh_directions(layers: Sequence[TuckerMemory]) -> None:
    """Recompute `u` and `t` of layers of one configuration from their cores, all at once.

    Their joint sign, which a decomposition leaves open, is kept as close to the previous one as possible: a flip would
    invert the ranking of the keys.
    """
    u, t = leading_singular_vectors(torch.stack([_summed(layer.cores) for layer in layers]))
    before_u, before_t = (torch.stack([getattr(layer, name) for layer in layers]).to(u.dtype) for name in "ut")
    agreement = (u * before_u).sum(-1, keepdim=True) + (t * before_t).sum(-1, keepdim=True)
    sign = torch.where(agreement < 0, -1.0, 1.0).to(u.dtype)
    torch._foreach_copy_([layer.u for layer in layers], list((u * sign).unbind()))
    torch._foreach_copy_([layer.t for layer in layers], list((t * sign).unbind()))


def leading_singular_vectors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right singular vectors (..., rank) of the largest singular value, up to their joint sign.

    For rank 2, the papers', in closed form: a decomposition makes the processor wait for the GPU.

    Args:
        matrices: (..., rank, rank).
    """
    if matrices.shape[-1] != 2:
        left, _, right = torch.linalg.svd(matrices)
        return left[..., 0], right[..., 0, :]
    wide = matrices.double()
    squared = wide.mT @ wide
    angle = torch.atan2(2 * squared[..., 0, 1], squared[..., 0, 0] - squared[..., 1, 1]) / 2
    t = torch.stack([angle.cos(), angle.sin()], dim=-1)
    image = (wide @ t.unsqueeze(-1)).squeeze(-1)
    length = image.norm(dim=-1, keepdim=True)
    u = torch.where(length > 0, image / length, t)
    return u.to(matrices.dtype), t.to(matrices.dtype)


def tucker_penalty(cores: Tensor, threshold: float) -> Tensor:
    """Mean squared excess over `threshold` of the summed cores' singular values but the largest.

    UltraMem (arXiv:2411.12364), section 3.1: it keeps the cores near the rank-1 approximation by which the axes
    are ranked.

    Args:
        cores: (cores, heads, rank, rank).
        threshold: excess is counted from here.

    Returns:
        Scalar, in float32 or wider; 0 for rank 1.
    """
    trailing = torch.linalg.svdvals(_summed(cores))[..., 1:]
    return F.relu(trailing - threshold).square().sum() / max(trailing.numel(), 1)


def _summed(cores: Tensor) -> Tensor:
    """The summed cores (heads, rank, rank), whole, in float32 or wider.

    Zero where they are not finite, so that a run that has diverged fails by its loss, not in the decomposition.
    """
    whole = cores.full_tensor() if isinstance(cores, DTensor) else cores
    return whole.sum(0).to(torch.promote_types(cores.dtype, torch.float32)).nan_to_num(0.0, 0.0, 0.0)
