"""The configuration of a model for the training host."""

from __future__ import annotations

import math
from dataclasses import dataclass

from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.lm_head import LMHeadConfig
from olmo_core.nn.rope import RoPEConfig

from ultramem.config import LARGEST_COUNT, LARGEST_SIZE, MemoryConfig
from ultramem.configuration.field_types import check_field, check_range, check_types
from ultramem.errors import ConfigError
from ultramem.hosts.olmo_core.model import MemoryBlockConfig, MemoryTransformer
from ultramem.hosts.olmo_core.moe import ROW_ALIGNMENT, MoEConfig
from ultramem.layers import HostScheme


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: RMSNorm before each sublayer, RoPE, query and key norms per head, SwiGLU, no biases.

    An invalid value raises `ConfigError` on construction.

    Attributes:
        d_model: width of the residual stream.
        num_blocks: number of transformer blocks.
        num_heads: number of attention heads; must divide `d_model` into heads of an even width.
        feed_forward_size: width of the SwiGLU feed-forward; not used with `moe`.
        vocab_size: number of embedding rows; multiples of 128 are fastest on GPUs.
        memory: memory layers beside the feed-forwards, or None.
        moe: mixture of experts instead of the feed-forwards, or None.
        tie_embeddings: whether the embedding and the output layer share a matrix.
        rope_theta: base of the rotary position embedding.
        norm_eps: epsilon of all norms except the memory's.
        init_std: standard deviation of the initial weights, which are truncated at three standard deviations. Weights
            that write to the residual stream have `init_std / sqrt(2 num_blocks)`. By default `sqrt(2 / (5 d_model))`,
            the papers' 0.02282 at width 768.
        seed: seed for the initial weights.
    """

    d_model: int
    num_blocks: int
    num_heads: int
    feed_forward_size: int
    vocab_size: int = 50304
    memory: MemoryConfig | None = None
    moe: MoEConfig | None = None
    tie_embeddings: bool = True
    rope_theta: int = 10000
    norm_eps: float = 1e-5
    init_std: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "d_model", "num_heads", least=1, most=LARGEST_SIZE)
        check_range(self, "feed_forward_size", least=0 if self.moe else 1, most=LARGEST_SIZE)
        check_range(self, "num_blocks", least=1, most=LARGEST_COUNT)
        check_range(self, "vocab_size", least=1, most=2**32)
        check_range(self, "rope_theta", least=1)
        check_range(self, "seed", least=0)
        check_range(self, "norm_eps", above=0, most=1)
        check_range(self, "init_std", above=0)
        if self.d_model % (2 * self.num_heads):
            raise ConfigError(
                f"num_heads={self.num_heads}: must divide d_model={self.d_model} into heads of an even width"
            )
        if self.memory is not None and self.moe is not None:
            raise ConfigError("moe: must be null for a model with memory; set one of them to null")
        aligned = self.moe is None or self.d_model % ROW_ALIGNMENT == 0
        check_field(self, "d_model", aligned, f"a multiple of {ROW_ALIGNMENT} with a mixture of experts")
        if self.memory is not None:
            try:
                self.memory.layout(len(self.memory.insertions(self.num_blocks)))
                self.memory.check_width(self.d_model)
            except ConfigError as error:
                raise ConfigError(f"memory.{error}") from error

    @property
    def system(self) -> str:
        """`dense`, `moe`, or the kind of memory."""
        if self.memory is not None and self.memory.insertion != "none":
            return self.memory.kind
        return "dense" if self.moe is None else "moe"

    @property
    def linear_std(self) -> float:
        """Standard deviation of the initial weights that do not write to the residual stream."""
        return math.sqrt(2 / (5 * self.d_model)) if self.init_std is None else self.init_std

    @property
    def output_std(self) -> float:
        """Standard deviation of the initial weights that write to the residual stream."""
        return self.linear_std / math.sqrt(2 * self.num_blocks)

    def build(self, device: str = "cpu") -> MemoryTransformer:
        """Build the model with uninitialised parameters on a device; OLMo-core's `init_weights` initialises them."""
        norm = LayerNormConfig(name=LayerNormType.rms, eps=self.norm_eps, bias=False)
        block = MemoryBlockConfig(
            sequence_mixer=AttentionConfig(
                n_heads=self.num_heads,
                bias=False,
                rope=RoPEConfig(theta=self.rope_theta),
                qk_norm=norm,
                use_head_qk_norm=True,
            ),
            feed_forward=self.moe or FeedForwardConfig(hidden_size=self.feed_forward_size, bias=False),
            layer_norm=norm,
        )
        return MemoryTransformer(
            d_model=self.d_model,
            vocab_size=self.vocab_size,
            n_layers=self.num_blocks,
            block=block,
            lm_head=LMHeadConfig(layer_norm=norm, bias=False),
            init_device=device,
            init_seed=self.seed,
            init_std=self.linear_std,
            tie_word_embeddings=self.tie_embeddings,
            memory=self.memory,
            memory_scheme=HostScheme.swiglu(self.d_model, self.feed_forward_size, self.linear_std, self.output_std),
        )
