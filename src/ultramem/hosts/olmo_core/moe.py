"""Mixture of experts in which no token is dropped: the sparse baseline (OLMoE, arXiv:2409.02060)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from olmo_core.nn.transformer import TransformerBlock
from olmo_core.nn.transformer.init import _apply_init
from olmo_core.ops import attach_auxiliary_loss
from torch import Tensor, nn

from ultramem.config import LARGEST_COUNT, LARGEST_SIZE
from ultramem.configuration.field_types import check_field, check_range, check_types

if TYPE_CHECKING:
    from olmo_core.train.common import ReduceType

# Grouped GEMM kernels read rows whose length is a multiple of 16 bytes, which is this many bfloat16 elements.
ROW_ALIGNMENT = 8


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of SwiGLU experts. An invalid value raises `ConfigError` on construction.

    Attributes:
        hidden_size: inner width of one expert, a multiple of 8.
        num_experts: number of experts.
        top_k: number of experts per token.
        load_balancing_coef: weight of the load-balancing loss; 0 turns it off.
        z_loss_coef: weight of the router z-loss; 0 turns it off.
        normalize_top_k: whether the chosen experts' probabilities are normalised to sum to 1. OLMoE: no.
    """

    hidden_size: int
    num_experts: int = 64
    top_k: int = 8
    load_balancing_coef: float = 0.01
    z_loss_coef: float = 0.001
    normalize_top_k: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        _check_aligned(self, "hidden_size")
        check_range(self, "num_experts", least=1, most=LARGEST_COUNT)
        check_range(self, "hidden_size", most=LARGEST_SIZE)
        right = 1 <= self.top_k <= self.num_experts
        check_field(self, "top_k", right, f"at least 1 and at most num_experts={self.num_experts}")
        check_range(self, "load_balancing_coef", "z_loss_coef", least=0)

    def num_params(self, d_model: int) -> int:
        """Number of parameters of the layer, including the router."""
        return d_model * self.num_experts * (1 + 3 * self.hidden_size)

    def num_active_params(self, d_model: int) -> int:
        """Number of parameters of the layer that a token uses: the router and `top_k` experts."""
        return d_model * (self.num_experts + 3 * self.top_k * self.hidden_size)

    def build(self, d_model: int, *, init_device: str = "cpu") -> DroplessMoE:
        """The layer for a model of width `d_model`, with its parameters on `init_device`."""
        return DroplessMoE(d_model, self, init_device=init_device)


def _check_aligned(owner: MoEConfig | DroplessMoE, name: str) -> None:
    width = getattr(owner, name)
    right = width >= 1 and width % ROW_ALIGNMENT == 0
    check_field(owner, name, right, f"a positive multiple of {ROW_ALIGNMENT}, as grouped matrix products need")


class DroplessMoE(nn.Module):
    """A feed-forward layer in which each token goes to the `top_k` experts that its router finds most probable.

    The router is linear with a softmax over all experts (OLMoE, section 2), in float32 or wider. Every expert takes all
    token copies that are sent to it. In training a backward pass from the output includes the two auxiliary losses.

    Parameters: `router.weight` (experts, d_model), `gate_proj` and `up_proj` (experts, d_model, hidden_size),
    `down_proj` (experts, hidden_size, d_model).

    Args:
        d_model: width of the input and output, a multiple of 8.
        config: sizes and loss weights.
        init_device: where the parameters are created.

    Raises:
        ConfigError: `d_model` is not a multiple of 8.
    """

    def __init__(self, d_model: int, config: MoEConfig, *, init_device: str = "cpu") -> None:
        super().__init__()
        self.d_model, self.config = d_model, config
        _check_aligned(self, "d_model")
        inward = (config.num_experts, d_model, config.hidden_size)
        outward = (config.num_experts, config.hidden_size, d_model)
        self.router = nn.Linear(d_model, config.num_experts, bias=False, device=init_device)
        self.gate_proj = nn.Parameter(torch.empty(inward, device=init_device))
        self.up_proj = nn.Parameter(torch.empty(inward, device=init_device))
        self.down_proj = nn.Parameter(torch.empty(outward, device=init_device))
        # Assignments of each expert, then the two losses summed over tokens. In a buffer, DDP would replace every
        # process's with the first one's.
        self._metric_sums = torch.zeros(config.num_experts + 2, dtype=torch.float64, device="cpu")
        self.init_weights()

    @torch.no_grad()
    def init_weights(
        self, std: float = 0.02, output_std: float | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Draw all weights from normal distributions truncated at 3 standard deviations, and reset the metrics.

        Sharded parameters (DTensor) get the values that the whole would have got.

        Args:
            std: standard deviation of the router and of the experts' two input projections.
            output_std: of the experts' output projections; `std` by default.
            generator: source of randomness, on the parameters' device.
        """
        output_std = std if output_std is None else output_std
        inputs = (self.router.weight, self.gate_proj, self.up_proj)
        for weight, weight_std in (*((weight, std) for weight in inputs), (self.down_proj, output_std)):
            bound = 3 * weight_std
            _apply_init(nn.init.trunc_normal_, weight, std=weight_std, a=-bound, b=bound, generator=generator)
        self.reset_metrics()

    def forward(self, x: Tensor, *, loss_div_factor: Tensor | float | None = None) -> Tensor:
        """Mix the chosen experts' outputs.

        Args:
            x: (..., d_model). The experts compute in its dtype, or in autocast's where that is on.
            loss_div_factor: what the auxiliary losses, summed over the tokens of `x`, are divided by: the number of
                tokens in the batch of which `x` is a part; that of `x` by default.

        Returns:
            (..., d_model), in the dtype of the computation.
        """
        tokens = x.reshape(-1, self.d_model)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(tokens.to(dtype), self.router.weight.to(dtype))
            probabilities = logits.softmax(dim=-1)
        weights, experts = probabilities.topk(self.config.top_k, dim=-1)
        if self.config.normalize_top_k:
            weights = weights / weights.sum(dim=-1, keepdim=True)

        sorted_experts, order = experts.flatten().sort(stable=True)
        every_expert = torch.arange(self.config.num_experts, device=x.device)
        group_ends = torch.searchsorted(sorted_experts, every_expert, right=True, out_int32=True)

        if self.training and torch.is_grad_enabled():
            loss = self._auxiliary_loss(logits, probabilities, group_ends)
            divisor = max(len(tokens), 1) if loss_div_factor is None else loss_div_factor
            weights = attach_auxiliary_loss(weights, loss * (len(tokens) / divisor))
        return self._mix(x, weights, order, group_ends)

    def _mix(self, x: Tensor, weights: Tensor, order: Tensor, group_ends: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        sources = order // self.config.top_k
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        places = places.view(*x.shape[:-1], self.config.top_k)

        rows = _Dispatch.apply(x.to(dtype), sources, places)
        gate = grouped_matmul(rows, self.gate_proj.to(dtype), group_ends)
        up = grouped_matmul(rows, self.up_proj.to(dtype), group_ends)
        # The last projection is linear: weighing its narrower input gives the same sum as weighing its output.
        row_weights = weights.flatten().index_select(0, order).to(dtype).unsqueeze(-1)
        rows = grouped_matmul(F.silu(gate) * up * row_weights, self.down_proj.to(dtype), group_ends)
        return _Combine.apply(rows, sources, places)

    def _auxiliary_loss(self, logits: Tensor, probabilities: Tensor, group_ends: Tensor) -> Tensor:
        assignments = group_ends.diff(prepend=group_ends.new_zeros(1))
        balance, z = load_balancing_loss(probabilities, assignments), router_z_loss(logits)
        with torch.no_grad():
            sums = torch.cat([assignments, torch.stack([balance, z]) * len(logits)])
            if self._metric_sums.device != sums.device:
                self._metric_sums = self._metric_sums.to(sums.device)
            self._metric_sums += sums  # in place, as a CUDA graph does it
        return self.config.load_balancing_coef * balance + self.config.z_loss_coef * z

    def reset_metrics(self) -> None:
        """Set the counts to zero."""
        self._metric_sums.zero_()

    @torch.no_grad()
    def compute_metrics(self, reset: bool = True) -> dict[str, tuple[Tensor, ReduceType | None]]:
        """Scalars over this process's training tokens since the last reset, and how to reduce over processes.

        `load imbalance` is the busiest expert's share of the assignments times the number of experts (1 is perfect
        balance); `load balancing loss` and `router Z loss` are means over tokens, without their weights. With `reset`
        the counts are set to zero.
        """
        from olmo_core.train.common import ReduceType  # brings the whole trainer, which only training needs

        assignments, losses = self._metric_sums[:-2], self._metric_sums[-2:]
        count = assignments.sum().clamp(min=1)
        balance, z = losses * self.config.top_k / count
        metrics: dict[str, tuple[Tensor, ReduceType | None]] = {
            "load imbalance": (assignments.max() * self.config.num_experts / count, ReduceType.max),
            "load balancing loss": (balance, ReduceType.mean),
            "router Z loss": (z, ReduceType.mean),
        }
        if reset:
            self.reset_metrics()
        return metrics

    def num_flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of training on one token, forward and backward: 6 per active parameter."""
        del seq_len
        return 6 * self.config.num_active_params(self.d_model)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, {self.config}"


def load_balancing_loss(probabilities: Tensor, assignments: Tensor) -> Tensor:
    """`num_experts * sum_i f_i P_i`: 1 in perfect balance (Switch Transformer, arXiv:2101.03961, equation 4).

    f_i is expert i's share of the assignments, P_i its mean router probability; the gradient is P's alone.

    Args:
        probabilities: (tokens, experts); the result is 0 if there are no tokens.
        assignments: (experts,), how many token copies went to each expert.
    """
    tokens, num_experts = probabilities.shape
    shares = assignments.to(probabilities.dtype) / assignments.sum().clamp(min=1)
    return num_experts * (shares * probabilities.sum(dim=0)).sum() / max(tokens, 1)


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of `logsumexp(logits)²` (ST-MoE, arXiv:2202.08906, equation 5); logits (tokens, experts).

    It is 0 if there are no tokens.
    """
    return logits.logsumexp(dim=-1).square().sum() / max(len(logits), 1)


def grouped_matmul(rows: Tensor, weights: Tensor, group_ends: Tensor) -> Tensor:
    """Multiply consecutive groups of rows by a matrix each.

    In bfloat16 this is one grouped GEMM, which never waits for the device; its row lengths must be multiples of 8
    elements. In other dtypes it is a loop over the groups: PyTorch's grouped GEMM either lacks them (float64), loops as
    well, or cannot be compiled with them (float32).

    Args:
        rows: (rows, in).
        weights: (groups, in, out).
        group_ends: (groups,), int32: the row at which each group ends. The last is the number of rows.

    Returns:
        (rows, out).
    """
    if rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weights, offs=group_ends)
    return _matmul_per_group(rows, weights, group_ends)


# The sizes change with every batch, and a compiled loop would be specialised to them.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _matmul_per_group(rows: Tensor, weights: Tensor, group_ends: Tensor) -> Tensor:
    sizes = group_ends.diff(prepend=group_ends.new_zeros(1)).tolist()
    groups = zip(rows.split(sizes), weights.unbind(), strict=True)
    return torch.cat([group @ weight for group, weight in groups])


# Dispatch and combine are each other's transpose. Written so, both are gathers in both directions, where automatic
# differentiation would scatter with atomic additions, in an order that changes from run to run.
class _Dispatch(torch.autograd.Function):
    """Copy each token to the places where its experts expect it: (..., d) to (tokens * k, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.reshape(-1, x.shape[-1]).index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad[places].sum(dim=-2), None, None


class _Combine(torch.autograd.Function):
    """Add up the copies of each token: (tokens * k, d) to (..., d)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sources: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(sources)
        return rows[places].sum(dim=-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (sources,) = ctx.saved_tensors
        return grad.reshape(-1, grad.shape[-1]).index_select(0, sources), None, None


class MoEBlock(TransformerBlock):
    """A pre-norm transformer block whose feed-forward is a `DroplessMoE`.

    The auxiliary losses are averaged over the model's blocks, as in OLMoE, and each micro-batch's counts by its share
    of the tokens in the batch.
    """

    def forward(self, x: Tensor, *, loss_div_factor: Tensor | float | None = None, **kwargs: Any) -> Tensor:
        """Run the block on x (batch, sequence, d_model); `loss_div_factor` as for `DroplessMoE`, others as ever."""
        h = self.attention_residual_stream(x, self.attention(self.attention_norm(x), **kwargs))
        tokens = max(x.shape[:-1].numel(), 1) if loss_div_factor is None else loss_div_factor
        mixed = self.feed_forward(self.feed_forward_norm(h), loss_div_factor=tokens * self.n_layers)
        return self.feed_forward_residual_stream(h, mixed)
