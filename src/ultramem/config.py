"""The configuration of a memory: one dataclass that checks itself, and the sizes that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ultramem.errors import ConfigError
from ultramem.field_types import check_types

Kind = Literal["pkm", "memory_plus", "ultramem", "ultramem_v2"]
Sharing = Literal["ring", "no_ring", "block"]
ValueProjectors = Literal["single", "per_block"]
Activation = Literal["gelu", "silu"]
Initialization = Literal["matched", "published", "zero_output"]

TUCKER_KINDS = ("ultramem", "ultramem_v2")

# What a kind takes where the field is left at None.
_KIND_DEFAULTS: dict[str, dict[str, Any]] = {
    "pkm": {"query_per_rank": False, "key_expansion": 1, "value_projectors": "single", "value_lr": 1e-3},
    "memory_plus": {
        "query_per_rank": False,
        "key_expansion": 1,
        "value_projectors": "single",
        "value_lr": 1e-3,
    },
    "ultramem": {"query_per_rank": False, "key_expansion": 2, "value_projectors": "per_block"},
    "ultramem_v2": {"query_per_rank": True, "key_expansion": 1, "value_projectors": "single"},
}


@dataclass(frozen=True)
class TableLayout:
    """Which rows of which table a model's memory layers can reach.

    Attributes:
        num_tables: tables in the model: one if it is shared, else one per memory layer.
        table_rows: rows of one table.
        window_keys: square root of `window_rows`.
        axis_keys: keys on each of a layer's two axes, `key_expansion * window_keys`.
        starts: for each layer, the table row at which its window starts.
    """

    num_tables: int
    table_rows: int
    window_keys: int
    axis_keys: int
    starts: tuple[int, ...]

    @property
    def window_rows(self) -> int:
        """Table rows that one layer can reach."""
        return self.window_keys**2


@dataclass(frozen=True)
class MemoryConfig:
    """The memory of one model: its kind, its sizes and the papers' switches.

    A value that cannot work raises `ConfigError` on construction. A field whose default is None takes the
    value that its kind prescribes.

    Attributes:
        kind: `pkm` (arXiv:1907.05242), `memory_plus` (arXiv:2412.09764), `ultramem` (arXiv:2411.12364) or
            `ultramem_v2` (arXiv:2508.18756).
        num_keys: square root of the rows that each memory layer contributes to the table.
        key_dim: width of a row key and of a column key.
        value_dim: width of a value row. PKM adds values to the residual stream directly: `d_model` there.
        pre_value_dim: width of a pre-value row; 0 means no pre-values. Tucker kinds only.
        top_k: rows read per head and token.
        axis_top_k: candidates kept on each axis before the grid; `top_k` by default. The papers use at most
            128. Product keys need no such bound and take none.
        heads: retrieval heads.
        tucker_rank: rank of the Tucker decomposed scores (TDQKR).
        cores: score cores (MCS); each weighs its own slice of the value.
        query_per_rank: whether each Tucker rank has a query of its own. UltraMemV2: yes.
        key_expansion: factor e by which each axis has more keys than the window, which gives e² virtual copies
            of the window (IVE). UltraMem: 2, others 1.
        value_projectors: `single`: virtual copies are summed and projected together; `per_block`: each copy has
            an output projection of its own. UltraMem: `per_block`, others `single`.
        share_ratio: share of the pooled table that one layer can reach, in (0, 1]. UltraMemV2 only.
        sharing: how the layers' windows lie in the table. `ring`: each starts where the layer's own rows start
            and wraps around; `no_ring`: the last windows end with the table instead; `block`: consecutive
            layers share a window.
        insertion: `all`: a memory layer in every block; `none`; or pairs such as `2:5/6:9`: read at block 2's
            feed-forward input, added to the residual stream after block 5. Pairs may overlap.
        pre_activation: activation of the pre-value products: None, `gelu` or `silu` (PEER, arXiv:2407.04153).
        output_dropout: dropout probability of the layer's output.
        query_conv: width in tokens of a causal depthwise convolution over the queries; 0 means none.
        balance_coef: weight of the loss that balances the use of the keys on each axis.
        tucker_penalty_coef: weight of the loss on the Tucker cores' trailing singular values.
        tucker_penalty_threshold: singular values below it are not penalised (UltraMem, section 3.1: 0.15).
        init: `matched`: output std of the feed-forward beside it (UltraMemV2, appendix A); `published`: the
            constants of the published code; `zero_output`: as `matched`, with an output of zero.
        value_lr_multiplier: the values' learning rate starts at this many times the model's ...
        value_lr_decay: ... and falls linearly to 1 times over this share of training.
        value_lr: constant learning rate of the values, used instead of the two above. PKM, Memory+: 1e-3.
        norm_eps: epsilon of the query and key norms.
    """

    kind: Kind = "ultramem_v2"
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
    value_lr_multiplier: float = 4.0
    value_lr_decay: float = 1.0
    value_lr: float | None = None
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        self._check_choice("kind", get_args(Kind))
        for name, default in _KIND_DEFAULTS[self.kind].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        self._check_values()
        if self.is_tucker:
            self._check_tucker()
        else:
            self._check_product_key()

    @property
    def is_tucker(self) -> bool:
        """Whether scores are Tucker decomposed (UltraMem, UltraMemV2) rather than sums (PKM, Memory+)."""
        return self.kind in TUCKER_KINDS

    @property
    def shares_table(self) -> bool:
        """Whether all layers read one table (Memory+, UltraMemV2) rather than one each (PKM, UltraMem)."""
        return self.kind in ("memory_plus", "ultramem_v2")

    @property
    def virtual_copies(self) -> int:
        """Virtual copies of a layer's window."""
        assert self.key_expansion is not None
        return self.key_expansion**2

    @property
    def output_width(self) -> int:
        """Width of what a lookup returns."""
        return self.value_dim * (self.virtual_copies if self.value_projectors == "per_block" else 1)

    def insertions(self, num_blocks: int) -> tuple[tuple[int, int], ...]:
        """Pairs of (block that is read, block after which is added), one for each memory layer, in order.

        Raises:
            ConfigError: a pair does not fit a model of `num_blocks` blocks.
        """
        if self.insertion == "all":
            return tuple((block, block) for block in range(num_blocks))
        if self.insertion == "none":
            return ()
        pairs = self._parse_insertion()
        last = max(add for _, add in pairs)
        if last >= num_blocks:
            raise ConfigError(
                f"insertion={self.insertion!r}: block {last} does not exist; the last of {num_blocks} blocks is "
                f"{num_blocks - 1}"
            )
        return tuple(sorted(pairs))

    def _parse_insertion(self) -> list[tuple[int, int]]:
        if self.insertion in ("all", "none"):
            return []
        pairs = []
        for pair in self.insertion.split("/"):
            read, _, add = pair.partition(":")
            if not (read.isdecimal() and add.isdecimal()):
                raise ConfigError(
                    f"insertion={self.insertion!r}: {pair!r} is not a pair such as 2:5; "
                    "write 'all', 'none', or pairs joined by '/', such as '2:5/6:9'"
                )
            if int(read) > int(add):
                raise ConfigError(
                    f"insertion={self.insertion!r}: in {pair!r} the block that is read must not come after the block "
                    "after which is added"
                )
            pairs.append((int(read), int(add)))
        return pairs

    def layout(self, num_layers: int) -> TableLayout:
        """The tables and windows of a model with `num_layers` memory layers.

        Raises:
            ConfigError: the windows come out empty, or hold fewer rows than `top_k` reads.
        """
        assert self.key_expansion is not None
        layer_rows = self.num_keys**2
        if self.kind == "ultramem_v2":
            table_rows = layer_rows * num_layers
            window_keys = math.isqrt(math.floor(table_rows * self.share_ratio + 1e-6))
            starts = tuple(self._start(layer, table_rows, window_keys**2) for layer in range(num_layers))
        else:
            table_rows, window_keys, starts = layer_rows, self.num_keys, (0,) * num_layers
        num_tables = min(num_layers, 1) if self.shares_table else num_layers
        axis_keys = self.key_expansion * window_keys
        if num_layers and axis_keys**2 < self.top_k:
            raise ConfigError(
                f"top_k={self.top_k}: a layer can reach only {axis_keys**2} rows; lower top_k or raise "
                f"num_keys={self.num_keys} or share_ratio={self.share_ratio}"
            )
        return TableLayout(num_tables, table_rows, window_keys, axis_keys, starts)

    def _start(self, layer: int, table_rows: int, window_rows: int) -> int:
        own = layer * self.num_keys**2
        if self.sharing == "ring":
            return own
        if self.sharing == "block":
            own = own // window_rows * window_rows
        return min(own, table_rows - window_rows)

    def _check_choice(self, name: str, choices: tuple[Any, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(str, choices))}")

    def _check_values(self) -> None:
        self._check_choice("sharing", get_args(Sharing))
        self._check_choice("value_projectors", get_args(ValueProjectors))
        self._check_choice("pre_activation", (None, *get_args(Activation)))
        self._check_choice("init", get_args(Initialization))
        check_types(self)
        for name, low in _SMALLEST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}={value}: must be at least {low}")
        for name in ("norm_eps", "value_lr"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value}: must be above 0")
        if not 0 < self.share_ratio <= 1:
            raise ConfigError(f"share_ratio={self.share_ratio}: must be above 0 and at most 1")
        if not 0 <= self.output_dropout < 1:
            raise ConfigError(f"output_dropout={self.output_dropout}: must be at least 0 and below 1")
        if not 0 < self.value_lr_decay <= 1:
            raise ConfigError(f"value_lr_decay={self.value_lr_decay}: must be above 0 and at most 1")
        for name, only in (("share_ratio", 1.0), ("sharing", "ring")):
            if self.kind != "ultramem_v2" and getattr(self, name) != only:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}: {self.kind} does not pool its layers' tables; leave it at "
                    f"{only!r} or choose kind='ultramem_v2'"
                )
        self._parse_insertion()

    def _check_tucker(self) -> None:
        if self.value_dim % self.cores:
            raise ConfigError(
                f"value_dim={self.value_dim}: must be a multiple of cores={self.cores}, whose scores weigh a slice each"
            )
        if self.pre_activation is not None and not self.pre_value_dim:
            raise ConfigError(f"pre_activation={self.pre_activation!r}: needs pre-values; set pre_value_dim above 0")
        if self.axis_top_k is not None and self.axis_top_k**2 < self.top_k:
            raise ConfigError(
                f"axis_top_k={self.axis_top_k}: gives {self.axis_top_k**2} grid cells, fewer than top_k={self.top_k}; "
                f"set it to at least {math.isqrt(self.top_k - 1) + 1}"
            )

    def _check_product_key(self) -> None:
        for name, only in _TUCKER_ONLY.items():
            if getattr(self, name) != only:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}: {self.kind} has no such switch; leave it at {only!r} or choose "
                    "kind='ultramem' or 'ultramem_v2'"
                )


_SMALLEST = {
    "num_keys": 1,
    "key_dim": 1,
    "value_dim": 1,
    "pre_value_dim": 0,
    "top_k": 1,
    "axis_top_k": 1,
    "heads": 1,
    "tucker_rank": 1,
    "cores": 1,
    "key_expansion": 1,
    "query_conv": 0,
    "balance_coef": 0,
    "tucker_penalty_coef": 0,
    "tucker_penalty_threshold": 0,
    "value_lr_multiplier": 0,
}
_TUCKER_ONLY: dict[str, Any] = {
    "axis_top_k": None,
    "tucker_rank": 2,
    "cores": 2,
    "pre_value_dim": 0,
    "query_per_rank": False,
    "key_expansion": 1,
    "value_projectors": "single",
    "tucker_penalty_coef": 0.0,
    "pre_activation": None,
}
