"""The configuration of a memory: a dataclass that checks its values and computes sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from ultramem.configuration.field_types import check_range, check_types, shown
from ultramem.errors import ConfigError
from ultramem.layers import KINDS
from ultramem.layers.memory_layer import MemoryLayer
from ultramem.tables.layout import TableLayout

LARGEST_SIZE = 2**20  # of a width or a number of keys
LARGEST_COUNT = 2**12  # of what is computed one by one
Sharing = Literal["ring", "no_ring", "block"]
ValueProjectors = Literal["single", "per_block"]
Activation = Literal["gelu", "silu"]
Initialization = Literal["matched", "published", "zero_output"]

ROWWISE_LR = 5e-3


@dataclass(frozen=True)
class MemoryConfig:
    """The memory of a model: its kind, sizes and options.

    An invalid value raises `ConfigError` on construction. A field left at None takes its kind's default, if there is
    one.

    Attributes:
        kind: `pkm` (arXiv:1907.05242), `memory_plus` (arXiv:2412.09764), `ultramem` (arXiv:2411.12364) or
            `ultramem_v2` (arXiv:2508.18756).
        num_keys: square root of the number of rows that each memory layer contributes to the table.
        key_dim: width of a row key and of a column key.
        value_dim: width of a value row. Must be `d_model` for PKM, which adds values to the residual stream directly.
        pre_value_dim: width of a pre-value row; 0 means no pre-values. UltraMem and UltraMemV2 only.
        top_k: number of rows read per head and token.
        axis_top_k: number of candidates per axis whose grid is searched; `top_k` by default. The papers use at most
            128. PKM and Memory+ search the whole grid and have no such limit.
        heads: number of retrieval heads.
        tucker_rank: rank of the Tucker decomposed scores (TDQKR).
        cores: number of score cores (MCS); each weights its own slice of the value.
        query_per_rank: whether each Tucker rank has its own query. UltraMemV2: yes.
        key_expansion: factor e by which each axis has more keys than the window has. This gives e² virtual copies of
            the window (IVE). UltraMem: 2, others: 1.
        value_projectors: `single` sums the virtual copies and projects the sum; `per_block` gives each virtual copy
            its own output projection. UltraMem: `per_block`, others: `single`.
        share_ratio: size of a layer's window as a share of the table, in (0, 1]. UltraMemV2 only.
        sharing: where the layers' windows are in the table. `ring`: each starts at the rows that its layer
            contributes, and wraps around at the end of the table. `no_ring`: as `ring`, but windows that would wrap
            around end with the table instead. `block`: consecutive layers share a window.
        insertion: `all` for a memory layer in every block, `none`, or pairs such as `2:5/6:9`: the first layer reads
            block 2's feed-forward input, and its output is added to the residual stream after block 5. Pairs may
            overlap.
        pre_activation: activation of the pre-value products: None, `gelu` or `silu` (PEER, arXiv:2407.04153).
        output_dropout: dropout probability of the layer's output.
        query_conv: width in tokens of a causal depthwise convolution over the queries; 0 means none.
        balance_coef: weight of the loss that balances the use of the keys on each axis.
        tucker_penalty_coef: weight of the loss on all singular values of the Tucker cores but the largest.
        tucker_penalty_threshold: singular values below it are not penalised (UltraMem, section 3.1: 0.15).
        init: initial values. `matched`: the output has the standard deviation of the feed-forward's output beside it
            (UltraMemV2, appendix A). `published`: the constants of the published code. `zero_output`: as `matched`,
            but with an output of zero.
        optimizer: `rowwise`: the values are trained with one number for each row (`ultramem.tables.rowwise`), at the
            rate `value_lr`; `adamw`: like other parameters, but at a rate of their own. By default `rowwise`, or
            `adamw` if `value_lr_multiplier` or `value_lr_decay` is set.
        value_lr: constant learning rate of the values. `rowwise`: 5e-3. `adamw` with PKM or Memory+: 1e-3.
        value_lr_multiplier: initial learning rate of the values, as a multiple of the model's; for `adamw` without
            `value_lr`.
        value_lr_decay: share of training over which this multiple falls linearly to 1.
        row_beta: decay rate of a row's mean square, for `rowwise`.
        table_dtype: dtype of the tables in training, and of nothing else. `bfloat16` is for `rowwise`, which rounds it
            stochastically; `float32` is like the other parameters.
        norm_eps: epsilon of the query and key norms.
    """

    kind: str = "ultramem_v2"
    num_keys: int = 128
    key_dim: int = 128
    value_dim: int = 128
    pre_value_dim: int = 0
    top_k: int = 32
    axis_top_k: int | None = None
    heads: int = 1
    tucker_rank: int = 2
    cores: int = 2
    query_per_rank: bool | None = None
    key_expansion: int | None = None
    value_projectors: ValueProjectors | None = None
    share_ratio: float = 1.0
    sharing: Sharing = "ring"
    insertion: str = "all"
    pre_activation: Activation | None = None
    output_dropout: float = 0.0
    query_conv: int = 0
    balance_coef: float = 0.0
    tucker_penalty_coef: float = 0.0
    tucker_penalty_threshold: float = 0.15
    init: Initialization = "matched"
    optimizer: Literal["rowwise", "adamw"] | None = None
    value_lr: float | None = None
    value_lr_multiplier: float = 4.0
    value_lr_decay: float = 1.0
    row_beta: float = 0.95
    table_dtype: Literal["float32", "bfloat16"] = "float32"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_types(self)
        if self.kind not in KINDS:
            raise ConfigError(f"kind={self.kind!r}: must be one of {', '.join(KINDS)}")
        if self.optimizer is None:
            object.__setattr__(self, "optimizer", "adamw" if self._falling_rate() else "rowwise")
        defaults = {**MemoryLayer.defaults, **self.layer_type.defaults}
        if self.optimizer == "rowwise":
            defaults["value_lr"] = ROWWISE_LR
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        self._check_values()
        self._check_unused(defaults)
        self.layer_type.check(self)

    @property
    def layer_type(self) -> type[MemoryLayer]:
        """The layer class of this kind."""
        return KINDS[self.kind]

    @property
    def virtual_copies(self) -> int:
        """Number of virtual copies of a layer's window."""
        assert self.key_expansion is not None
        return self.key_expansion**2

    @property
    def output_width(self) -> int:
        """Width of the lookup's result."""
        return self.value_dim * (self.virtual_copies if self.value_projectors == "per_block" else 1)

    def insertions(self, num_blocks: int) -> tuple[tuple[int, int], ...]:
        """Pairs (block that the layer reads, block after which its output is added) of all memory layers, in order.

        Raises:
            ConfigError: a pair does not fit a model of `num_blocks` blocks.
        """
        if self.insertion == "all":
            return tuple((block, block) for block in range(num_blocks))
        pairs = self._parse_insertion()
        last = max((add for _, add in pairs), default=-1)
        if last >= num_blocks:
            raise ConfigError(
                f"insertion={shown(self.insertion)}: block {last} does not exist; the last of {num_blocks} blocks is "
                f"{num_blocks - 1}"
            )
        return tuple(sorted(pairs))

    def _parse_insertion(self) -> list[tuple[int, int]]:
        if self.insertion in ("all", "none"):
            return []
        pairs, given = [], f"insertion={shown(self.insertion)}"
        for pair in self.insertion.split("/"):
            if not re.fullmatch("[0-9]{1,9}:[0-9]{1,9}", pair):
                raise ConfigError(
                    f"{given}: {shown(pair)} is not a pair such as 2:5; "
                    "write 'all', 'none', or pairs joined by '/', such as '2:5/6:9'"
                )
            read, add = map(int, pair.split(":"))
            if read > add:
                raise ConfigError(
                    f"{given}: in {shown(pair)} the first block must not come after the second, after "
                    "which the output is added"
                )
            pairs.append((read, add))
        return pairs

    def layout(self, num_layers: int) -> TableLayout:
        """The tables and windows of a model with `num_layers` memory layers.

        Raises:
            ConfigError: a window is empty or has fewer rows than `top_k`.
        """
        layout = self.layer_type.layout(self, num_layers)
        if num_layers and layout.axis_keys**2 < self.top_k:
            raise ConfigError(
                f"top_k={self.top_k}: must be at most {layout.axis_keys**2}, the number of rows that a layer can reach "
                "(virtual copies included); lower it, or raise "
                f"num_keys={self.num_keys} or share_ratio={self.share_ratio}"
            )
        return layout

    def check_width(self, d_model: int) -> None:
        """Check that the memory fits a model of width `d_model`.

        Raises:
            ConfigError: the memory does not fit.
        """
        self.layer_type.check(self, d_model)

    def value_lr_factor(self, step: int, steps: int) -> float:
        """Learning rate of the values at a step, as a multiple of the model's; 1 if `value_lr` sets it.

        UltraMem (arXiv:2411.12364): `1 + (m - 1) * max(0, 1 - step / (steps * d))` with m `value_lr_multiplier` and d
        `value_lr_decay`. Steps count from 0; the whole training has `steps`.
        """
        if self.value_lr is not None:
            return 1.0
        return 1 + (self.value_lr_multiplier - 1) * max(0.0, 1 - step / (steps * self.value_lr_decay))

    def _check_values(self) -> None:
        check_range(self, "num_keys", "key_dim", "value_dim", "top_k", "axis_top_k", least=1, most=LARGEST_SIZE)
        check_range(self, "heads", "tucker_rank", "cores", "key_expansion", least=1, most=LARGEST_COUNT)
        check_range(self, "pre_value_dim", "query_conv", least=0, most=LARGEST_SIZE)
        check_range(self, "balance_coef", "tucker_penalty_coef", "tucker_penalty_threshold", least=0)
        check_range(self, "value_lr_multiplier", least=0)
        check_range(self, "norm_eps", above=0, most=1)
        check_range(self, "value_lr", above=0)
        check_range(self, "share_ratio", "value_lr_decay", above=0, most=1)
        check_range(self, "output_dropout", "row_beta", least=0, below=1)
        for name in self._falling_rate() if self.value_lr is not None else ():
            remedy = (
                "leave out one of them" if self.optimizer == "adamw" else "leave it out, or set optimizer to 'adamw'"
            )
            raise ConfigError(
                f"{name}={getattr(self, name)}: the values have a constant learning rate, value_lr={self.value_lr}; "
                f"{remedy}"
            )
        if self.optimizer == "adamw" and self.row_beta != MemoryConfig.row_beta:
            raise ConfigError(f"row_beta={self.row_beta}: only optimizer='rowwise' uses it; leave out one of them")
        if self.optimizer == "adamw" and self.table_dtype == "bfloat16":
            raise ConfigError(
                "table_dtype='bfloat16': optimizer='adamw' rounds to the nearest, which would undo most of its steps; "
                "set optimizer='rowwise', which rounds stochastically, or leave table_dtype out"
            )
        self._parse_insertion()

    def _falling_rate(self) -> list[str]:
        """The fields of a falling learning rate that are set, of a kind that uses them."""
        fields = ("value_lr_multiplier", "value_lr_decay")
        used = [name for name in fields if name not in self.layer_type.unused]
        return [name for name in used if getattr(self, name) != getattr(MemoryConfig, name)]

    def _check_unused(self, defaults: dict[str, Any]) -> None:
        kind = self.layer_type
        for field in fields(self):
            only = defaults.get(field.name, field.default)
            if field.name in kind.unused and getattr(self, field.name) != only:
                others = [f"kind={name!r}" for name, other in KINDS.items() if field.name not in other.unused]
                raise ConfigError(
                    f"{field.name}={getattr(self, field.name)!r}: {self.kind} {kind.unused[field.name]}; leave it out, "
                    f"or choose {' or '.join(others)}"
                )
