"""The base class of UltraMem and UltraMemV2: Tucker-decomposed scores, score cores, pre-values, virtual copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ultramem.errors import ConfigError
from ultramem.files.checksums import DamagedFileError
from ultramem.layers import decoding
from ultramem.layers.decoding import Folded
from ultramem.layers.initial_values import SIMULATED_TOKENS, HostScheme
from ultramem.layers.memory_layer import MemoryLayer, balance_loss, rms_norm
from ultramem.ops.choose_reads.grid import Grid, GridSizes
from ultramem.ops.kernels.axis_scores import pad_keys
from ultramem.ops.tucker_topk import tucker_topk
from ultramem.ops.tucker_topk.naive import axis_scores
from ultramem.ops.tucker_topk.naive import tucker_topk as tucker_topk_by_definition
from ultramem.ops.weighted_lookup.reads import Reads
from ultramem.tables.filling import fill, normal
from ultramem.tables.table import Table

if TYPE_CHECKING:
    from ultramem.config import MemoryConfig


class TuckerMemory(MemoryLayer):
    """A layer with Tucker-decomposed scores (UltraMem, arXiv:2411.12364, section 3.1), whose weights are the scores.

    Heads share the queries and have their own keys. `u` and `t` (heads, rank) are the leading singular vectors of each
    head's summed cores. They have no gradient, and `refresh` recomputes them after each optimizer step. Arguments as in
    `MemoryLayer`.
    """

    published_gain_exponent: ClassVar[float]  # of key_dim, in the published code's norm gains

    u: Tensor
    t: Tensor
    shuffle: Tensor
    pre_proj: nn.Linear | None

    def __init__(self, config: MemoryConfig, d_model: int, table: Table, **options: Any) -> None:
        super().__init__(config, d_model, table, **options)
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        heads, rank = config.heads, config.tucker_rank
        self.query_norm = nn.RMSNorm(config.key_dim, eps=config.norm_eps, **factory)
        self.key_norm = nn.RMSNorm(config.key_dim, eps=config.norm_eps, **factory)
        self.keys = nn.Parameter(torch.empty(heads, 2, self.axis_keys, config.key_dim, rank, **factory))
        self.cores = nn.Parameter(torch.empty(config.cores, heads, rank, rank, **factory))
        self.pre_proj = None
        if config.pre_value_dim:
            self.pre_proj = nn.Linear(d_model, config.pre_value_dim, bias=False, **factory)
        self.output_proj = nn.Linear(config.output_width, d_model, bias=False, **factory)
        self.register_buffer("u", torch.zeros(heads, rank, **factory))
        self.register_buffer("t", torch.zeros(heads, rank, **factory))
        self.register_buffer("shuffle", torch.empty(self.axis_keys**2, dtype=torch.int64, device=options.get("device")))

    @classmethod
    def queries_per_token(cls, config: MemoryConfig) -> int:
        return 2 * (config.tucker_rank if config.query_per_rank else 1)

    @classmethod
    def count_parameters(cls, config: MemoryConfig, d_model: int, axis_keys: int) -> int:
        """As in `MemoryLayer`."""
        keys = config.heads * 2 * axis_keys * config.key_dim * config.tucker_rank
        cores = config.cores * config.heads * config.tucker_rank**2
        own = 2 * config.key_dim + keys + cores + d_model * (config.pre_value_dim + config.output_width)
        return super().count_parameters(config, d_model, axis_keys) + own

    @classmethod
    def check(cls, config: MemoryConfig, d_model: int | None = None) -> None:
        if config.value_dim % config.cores:
            raise ConfigError(
                f"value_dim={config.value_dim}: must be a multiple of cores={config.cores}, each of which weights a "
                "slice"
            )
        if config.pre_activation is not None and not config.pre_value_dim:
            raise ConfigError(f"pre_activation={config.pre_activation!r}: needs pre-values; set pre_value_dim above 0")
        if config.axis_top_k is not None and config.axis_top_k**2 < config.top_k:
            raise ConfigError(
                f"axis_top_k={config.axis_top_k}: gives {config.axis_top_k**2} grid cells, fewer than "
                f"top_k={config.top_k}; set it to at least {math.isqrt(config.top_k - 1) + 1}"
            )

    @property
    def axis_top_k(self) -> int:
        """Number of candidates kept on each axis."""
        return min(self.config.axis_top_k or self.config.top_k, self.axis_keys)

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """As in `MemoryLayer`; the weights are the scores of each core."""
        queries, keys = self.normed_queries(queries), self.normed_keys()
        scores, indices = tucker_topk(queries, keys, self.cores, self.u, self.t, self.config.top_k, self.axis_top_k)
        if self.training:
            self.auxiliary_loss = self._auxiliary_loss(queries, keys)
        return scores.flatten(1, 2), indices.flatten(1)

    def normed_queries(self, queries: Tensor) -> Tensor:
        """Normalised row and column queries (tokens, 2, rank, key_dim) of queries (tokens, num_queries, key_dim)."""
        normed = rms_norm(queries, None, self.config.norm_eps)  # keys get the gain, as there are fewer of them
        return normed.unflatten(1, (2, self.num_queries // 2)).expand(-1, -1, self.config.tucker_rank, -1)

    def normed_keys(self) -> Tensor:
        """Normalised row and column keys (heads, 2, axis_keys, rank, key_dim), with their gain and the queries'."""
        gain = self.key_norm.weight * self.query_norm.weight
        return rms_norm(self.keys.transpose(3, 4), gain, self.config.norm_eps)

    def locate(self, indices: Tensor, scores: Tensor, x: Tensor) -> Reads:
        """As in `MemoryLayer`: the shuffle maps indices to virtual copies and table rows."""
        config, virtual = self.config, self.shuffle[indices]
        rows = self.table_rows(virtual if config.virtual_copies == 1 else virtual % self.window_rows)
        pre_input = None if self.pre_proj is None else self.pre_proj(x)
        copies = virtual // self.window_rows if config.value_projectors == "per_block" else None
        return Reads(rows, scores, pre_input, config.pre_activation, copies, config.virtual_copies)

    def project(self, looked_up: Tensor, x: Tensor) -> Tensor:
        return decoding.apply(self.output_proj, looked_up)

    @property
    def grid_sizes(self) -> GridSizes:
        """As in `MemoryLayer`."""
        config = self.config
        return GridSizes(self.axis_keys, config.top_k, self.axis_top_k, config.tucker_rank, config.heads)

    @property
    def score_cores(self) -> int:
        """As in `MemoryLayer`."""
        return self.config.cores

    def joined_projections(self) -> list[nn.Linear]:
        return [self.query_proj] if self.pre_proj is None else [self.query_proj, self.pre_proj]

    def folded_parameters(self) -> list[Tensor]:
        own = self.keys, self.key_norm.weight, self.query_norm.weight, self.cores
        return [*super().folded_parameters(), *own]

    def fold(self, dtype: torch.dtype) -> Folded:
        """As in `MemoryLayer`."""
        config, wide = self.config, torch.promote_types(dtype, torch.float32)
        cores, u, t = (part.to(wide, copy=True) for part in (self.cores, self.u, self.t))
        grid = Grid(
            keys=pad_keys(self.normed_keys().to(dtype).permute(1, 3, 0, 2, 4)), sizes=self.grid_sizes,
            query_steps=(self.num_queries // 2, int(config.query_per_rank is True), 0), norm_eps=config.norm_eps,
            cores=cores, u=u, t=t, shuffle=self.shuffle, window_start=int(self.window_start),
            window_rows=self.window_rows, table_rows=self.table.rows,
            separate_copies=config.value_projectors == "per_block",
        )  # fmt: skip
        return Folded(self.fold_projections(dtype), grid)

    def check_loaded(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """As in `MemoryLayer`: the shuffle must be a permutation, `u` and `t` finite."""
        for name in ("shuffle", "u", "t"):
            tensor = state.get(f"{prefix}{name}")
            if tensor is None or tensor.is_meta or tensor.shape != getattr(self, name).shape:
                continue  # whoever loads the state finds what is missing or of another shape
            if not (_is_permutation(tensor) if name == "shuffle" else tensor.isfinite().all()):
                must = "a permutation of the virtual rows, int64" if name == "shuffle" else "finite"
                raise DamagedFileError(f"{prefix}{name} is damaged: it must be {must}")

    def refresh(self) -> None:
        """Recompute `u` and `t` from the cores; call once after each optimizer step."""
        self.refresh_all([self])

    @classmethod
    @torch.no_grad()
    def refresh_all(cls, layers: Sequence[MemoryLayer]) -> None:
        """As in `MemoryLayer`: `u` and `t`, all at once.

        A decomposition does not determine their joint sign. It is kept as close to the previous one as possible, as a
        flip would invert the ranking of the keys.
        """
        tucker = [layer for layer in layers if isinstance(layer, TuckerMemory)]
        u, t = leading_singular_vectors(torch.stack([_summed(layer.cores) for layer in tucker]))
        before_u, before_t = (torch.stack([getattr(layer, name) for layer in tucker]).to(u.dtype) for name in "ut")
        agreement = (u * before_u).sum(-1, keepdim=True) + (t * before_t).sum(-1, keepdim=True)
        sign = torch.where(agreement < 0, -1.0, 1.0).to(u.dtype)
        torch._foreach_copy_([layer.u for layer in tucker], list((u * sign).unbind()))
        torch._foreach_copy_([layer.t for layer in tucker], list((t * sign).unbind()))

    def metrics(self) -> dict[str, Tensor]:
        """As in `MemoryLayer`: the singular values of the summed cores."""
        return {f"singular value {number}": value for number, value in enumerate(self.singular_values(), start=1)}

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        """(rank,) singular values of the summed cores, descending, mean over the heads."""
        return torch.linalg.svdvals(_summed(self.cores)).mean(0)

    def init_retrieval(self, scheme: HostScheme, generator: torch.Generator) -> float:
        """As in `MemoryLayer`; norm gains make the mean chosen score 1."""
        normal(self.keys, self.config.key_dim**-0.5, generator)
        self.init_cores(generator)
        mean, second = self.simulate_scores()
        # A layer that reads almost every row has a mean score of about 0, which cannot be scaled to 1.
        mean = max(mean, math.sqrt(second) / 2)
        self._set_gains(mean**-0.25)  # scores grow with the square of both
        if self.pre_proj is not None:
            normal(self.pre_proj.weight, scheme.linear_std, generator)
        return self.config.heads * self.config.top_k * second / mean**2

    def init_output(self, scheme: HostScheme, generator: torch.Generator) -> float:
        return self.init_projection(self.output_proj.weight, scheme, generator)

    def init_published(self, generator: torch.Generator) -> None:
        config = self.config
        normal(self.query_proj.weight, config.key_dim**-0.5, generator)
        normal(self.keys, config.key_dim**-0.5, generator)
        self.init_cores(generator)
        self._set_gains(config.key_dim**self.published_gain_exponent)
        normal(self.output_proj.weight, config.output_width**-0.5, generator)
        if self.pre_proj is not None:
            normal(self.pre_proj.weight, self.d_model**-0.5, generator)

    def init_cores(self, generator: torch.Generator) -> None:
        """Initialise the cores, `u` and `t`, and the shuffle."""
        fill(self.cores, lambda full: full.uniform_(0, 1, generator=generator))
        self.shuffle.copy_(torch.randperm(self.shuffle.numel(), generator=generator, device=self.shuffle.device))
        # Cores are positive, and so are their leading singular vectors up to the joint sign, which follows the old one.
        self.u.fill_(1)
        self.t.fill_(1)
        self.refresh()

    def simulate_scores(self) -> tuple[float, float]:
        """Mean and mean square of the chosen scores with norm gains of 1, on random input."""
        config, device = self.config, self.u.device
        generator = torch.Generator(device).manual_seed(0)

        def unit_rows(*shape: int) -> Tensor:
            rows = torch.randn(shape, generator=generator, device=device)
            return F.rms_norm(rows, shape[-1:], eps=config.norm_eps)

        queries = unit_rows(2, self.num_queries // 2, SIMULATED_TOKENS, config.key_dim).permute(2, 0, 1, 3)
        queries = queries.expand(-1, -1, config.tucker_rank, -1)
        keys = unit_rows(2, config.tucker_rank, config.heads, self.axis_keys, config.key_dim).permute(2, 0, 3, 1, 4)
        cores, u, t = _whole(self.cores).float(), self.u.float(), self.t.float()
        chosen, _ = tucker_topk_by_definition(queries, keys, cores, u, t, config.top_k, self.axis_top_k)
        return float(chosen.mean()), float(chosen.square().mean())

    def _set_gains(self, gain: float) -> None:
        nn.init.constant_(self.query_norm.weight, gain)
        nn.init.constant_(self.key_norm.weight, gain)

    def _auxiliary_loss(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        config = self.config
        losses = []
        if config.balance_coef:
            for scores, direction in zip(axis_scores(queries, keys), (self.u, self.t), strict=True):
                axis = torch.einsum("thrn,hr->thn", scores, direction.to(scores.dtype))
                losses.append(config.balance_coef * balance_loss(axis, self.axis_top_k))
        if config.tucker_penalty_coef:
            losses.append(config.tucker_penalty_coef * tucker_penalty(self.cores, config.tucker_penalty_threshold))
        return torch.stack(losses).sum() if losses else None


def leading_singular_vectors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right singular vectors (..., rank) of matrices' (..., rank, rank) largest value, up to their joint sign.

    Rank 2, that of the papers, has a closed form: a decomposition would make the CPU wait for the GPU.
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
    """Mean squared excess over `threshold` of all singular values of the summed cores but the largest; 0 for rank 1.

    UltraMem (arXiv:2411.12364), section 3.1: it keeps the cores (cores, heads, rank, rank) near the rank-1
    approximation that ranks the axes. A scalar, in float32 or wider.
    """
    trailing = torch.linalg.svdvals(_summed(cores))[..., 1:]
    return F.relu(trailing - threshold).square().sum() / max(trailing.numel(), 1)


def _is_permutation(indices: Tensor) -> bool:
    """Whether indices (n,) are the numbers from 0 to n - 1 as int64, each once."""
    if indices.dtype != torch.int64 or not ((indices >= 0) & (indices < len(indices))).all():
        return False
    found = torch.zeros(len(indices), dtype=torch.bool, device=indices.device)
    found[indices] = True
    return bool(found.all())


def _whole(cores: Tensor) -> Tensor:
    return cores.full_tensor() if isinstance(cores, DTensor) else cores


def _summed(cores: Tensor) -> Tensor:
    """The summed cores (heads, rank, rank), not sharded, in float32 or wider.

    Values that are not finite become 0, so that a run that has diverged fails by its loss, not in the decomposition.
    """
    return _whole(cores).sum(0).to(torch.promote_types(cores.dtype, torch.float32)).nan_to_num(0.0, 0.0, 0.0)
