"""The configuration: what it refuses, what it fills in, and the sizes that follow."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from ultramem import ConfigError, MemoryConfig, UltraMemError

NAN, INFINITY = float("nan"), float("inf")
NOT_COUNTS: list[Any] = [-1, 1.5, "3", True, None]
NOT_NUMBERS: list[Any] = [-0.1, NAN, INFINITY, "0.1", True]
BAD_VALUES: dict[str, list[Any]] = {
    "kind": ["ultramem_v3", "", None, 2, ["pkm"]],
    "num_keys": [0, *NOT_COUNTS],
    "key_dim": [0, *NOT_COUNTS],
    "value_dim": [0, 3, *NOT_COUNTS],  # 3 is no multiple of two cores
    "pre_value_dim": NOT_COUNTS,
    "top_k": [0, *NOT_COUNTS],
    "axis_top_k": [0, -1, 5, 1.5, "3", True],  # 5 * 5 is less than top_k
    "heads": [0, *NOT_COUNTS],
    "tucker_rank": [0, *NOT_COUNTS],
    "cores": [0, *NOT_COUNTS],
    "query_per_rank": [1, "yes"],
    "key_expansion": [0, -1, 1.5, "2", True],
    "value_projectors": ["both", 1],
    "share_ratio": [0, 1.01, None, *NOT_NUMBERS],
    "sharing": ["all", None, 1],
    "insertion": ["", "some", "2", "2:", ":2", "2:5/", "5:2", "-1:2", "2:5,6:9", "1.5:2", 125, None],
    "pre_activation": ["relu", "gelu", 1],  # gelu needs pre-values
    "output_dropout": [1, 1.5, None, *NOT_NUMBERS],
    "query_conv": NOT_COUNTS,
    "balance_coef": [None, *NOT_NUMBERS],
    "tucker_penalty_coef": [None, *NOT_NUMBERS],
    "tucker_penalty_threshold": [None, *NOT_NUMBERS],
    "init": ["zero", None],
    "value_lr_multiplier": [None, *NOT_NUMBERS],
    "value_lr_decay": [0, 1.5, None, *NOT_NUMBERS],
    "value_lr": [0, *NOT_NUMBERS],
    "optimizer": ["sgd", 1],
    "row_beta": [-0.1, 1, None, *NOT_NUMBERS],
    "table_dtype": ["float16", None, 1],
    "norm_eps": [0, None, *NOT_NUMBERS],
}


def test_every_field_has_bad_values() -> None:
    assert set(BAD_VALUES) == {field.name for field in fields(MemoryConfig)}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in BAD_VALUES for value in BAD_VALUES[field]])
def test_a_bad_value_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        MemoryConfig(**{field: value})
    message = str(raised.value)
    assert message.startswith((f"{field}={value!r}: ", f"{field}={value}: "))
    assert "\n" not in message
    assert isinstance(raised.value, UltraMemError)


@pytest.mark.parametrize("kind", ["pkm", "memory_plus"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("axis_top_k", 8),
        ("tucker_rank", 3),
        ("cores", 1),
        ("pre_value_dim", 8),
        ("query_per_rank", True),
        ("key_expansion", 2),
        ("value_projectors", "per_block"),
        ("tucker_penalty_coef", 0.1),
        ("pre_activation", "gelu"),
        ("share_ratio", 0.5),
        ("sharing", "block"),
        ("tucker_penalty_threshold", 0.1),
        ("value_lr_multiplier", 2.0),
        ("value_lr_decay", 0.5),
    ],
)
def test_a_switch_that_the_kind_does_not_have(kind: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field}={value!r}: {kind} "):
        MemoryConfig(kind=kind, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("field", "value"), [("share_ratio", 0.5), ("sharing", "no_ring")])
def test_only_ultramem_v2_pools_its_tables(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field}={value!r}: ultramem does not pool"):
        MemoryConfig(kind="ultramem", **{field: value})


def test_pkm_has_no_norms() -> None:
    with pytest.raises(ConfigError, match=r"norm_eps=1e-06: pkm normalises neither .*; leave it out, or choose kind="):
        MemoryConfig(kind="pkm", norm_eps=1e-6)
    assert MemoryConfig(kind="memory_plus", norm_eps=1e-6).norm_eps == 1e-6


@pytest.mark.parametrize(("field", "value"), [("value_lr_multiplier", 2.0), ("value_lr_decay", 0.5)])
def test_a_constant_rate_and_one_that_falls(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field}={value}: .*value_lr=0.001.*; leave out one of them"):
        MemoryConfig(value_lr=1e-3, **{field: value})


@pytest.mark.parametrize("options", [{"optimizer": "adamw"}, {"value_lr_multiplier": 2.0}])
def test_adamw_does_not_round_stochastically(options: dict[str, Any]) -> None:
    assert MemoryConfig(table_dtype="bfloat16").optimizer == "rowwise"
    with pytest.raises(ConfigError, match=r"table_dtype='bfloat16': optimizer='adamw' rounds .*; set optimizer='rowwi"):
        MemoryConfig(table_dtype="bfloat16", **options)


@pytest.mark.parametrize(("step", "factor"), [(0, 5.0), (25, 3.0), (50, 1.0), (99, 1.0)])
def test_the_values_learning_rate(step: int, factor: float) -> None:
    assert MemoryConfig(value_lr_multiplier=5.0, value_lr_decay=0.5).value_lr_factor(step, 100) == pytest.approx(factor)
    assert MemoryConfig(value_lr=1e-3).value_lr_factor(step, 100) == 1.0


def test_a_falling_rate_is_adamws() -> None:
    for field in ("value_lr_multiplier", "value_lr_decay"):
        assert MemoryConfig(**{field: 0.5}).optimizer == "adamw"  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"{field}=0.5: .* value_lr=0.005; leave it out, or set optimizer to"):
            MemoryConfig(optimizer="rowwise", **{field: 0.5})  # type: ignore[arg-type]


def test_replace_checks_again() -> None:
    with pytest.raises(ConfigError, match="top_k=0"):
        replace(MemoryConfig(), top_k=0)


@pytest.mark.parametrize(
    ("kind", "query_per_rank", "key_expansion", "value_projectors", "adamw_lr"),
    [
        ("pkm", False, 1, "single", 1e-3),
        ("memory_plus", False, 1, "single", 1e-3),
        ("ultramem", False, 2, "per_block", None),
        ("ultramem_v2", True, 1, "single", None),
    ],
)
def test_defaults_of_each_kind(
    kind: Any, query_per_rank: bool, key_expansion: int, value_projectors: str, adamw_lr: float | None
) -> None:
    config = MemoryConfig(kind=kind)
    assert config.query_per_rank is query_per_rank
    assert (config.key_expansion, config.value_projectors) == (key_expansion, value_projectors)
    assert (config.optimizer, config.value_lr) == ("rowwise", 5e-3)
    assert MemoryConfig(kind=kind, optimizer="adamw").value_lr == adamw_lr
    assert config.axis_top_k is None
    assert config.output_width == config.value_dim * (4 if kind == "ultramem" else 1)


def test_defaults_of_a_kind_give_way() -> None:
    config = MemoryConfig(kind="ultramem", key_expansion=3, value_projectors="single", query_per_rank=True)
    assert (config.key_expansion, config.value_projectors, config.query_per_rank) == (3, "single", True)
    assert config.virtual_copies == 9
    assert config.output_width == config.value_dim


# Four layers of 3² rows, each reaching half of the 36: windows of isqrt(18) = 4, 4² rows.
STARTS = {
    "ring": (0, 9, 18, 27),  # the last wraps around to row 6
    "no_ring": (0, 9, 18, 20),  # the last ends with the table
    "block": (0, 0, 16, 16),  # two layers in each window of 16 rows
}


@pytest.mark.parametrize("sharing", STARTS)
def test_layouts(sharing: Any) -> None:
    layout = MemoryConfig(num_keys=3, share_ratio=0.5, sharing=sharing, top_k=4, key_expansion=2).layout(4)
    assert (layout.num_tables, layout.table_rows, layout.window_keys, layout.window_rows) == (1, 36, 4, 16)
    assert layout.axis_keys == 8
    assert layout.starts == STARTS[sharing]


def test_block_windows_never_pass_the_end_of_the_table() -> None:
    layout = MemoryConfig(num_keys=3, share_ratio=0.6, sharing="block", top_k=4).layout(5)
    assert (layout.table_rows, layout.window_rows) == (45, 25)
    assert layout.starts == (0, 0, 0, 20, 20)


@pytest.mark.parametrize(("kind", "tables"), [("pkm", 4), ("memory_plus", 1), ("ultramem", 4)])
def test_layouts_without_pooling(kind: Any, tables: int) -> None:
    layout = MemoryConfig(kind=kind, num_keys=5, top_k=4).layout(4)
    assert (layout.num_tables, layout.table_rows, layout.window_keys) == (tables, 25, 5)
    assert layout.axis_keys == (10 if kind == "ultramem" else 5)
    assert layout.starts == (0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["pkm", "memory_plus", "ultramem", "ultramem_v2"])
def test_no_layers(kind: Any) -> None:
    layout = MemoryConfig(kind=kind).layout(0)
    assert (layout.num_tables, layout.starts) == (0, ())


@pytest.mark.parametrize(
    ("num_keys", "layers", "axis_keys", "table_rows"), [(360, 20, 1138, 2_592_000), (528, 16, 1493, 4_460_544)]
)
def test_published_sizes(num_keys: int, layers: int, axis_keys: int, table_rows: int) -> None:
    layout = MemoryConfig(num_keys=num_keys, share_ratio=0.5).layout(layers)
    assert (layout.axis_keys, layout.table_rows) == (axis_keys, table_rows)


@pytest.mark.parametrize("options", [{"num_keys": 2}, {"num_keys": 4, "share_ratio": 0.1}, {"num_keys": 1}])
def test_more_rows_read_than_reached(options: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError,
        match=r"top_k=32: must be at most \d+, the number of rows that a layer can reach .*; lower it, or raise",
    ):
        MemoryConfig(**options).layout(2)


def test_insertions() -> None:
    assert MemoryConfig().insertions(3) == ((0, 0), (1, 1), (2, 2))
    assert MemoryConfig(insertion="none").insertions(3) == ()
    assert MemoryConfig(insertion="2:5/6:9").insertions(10) == ((2, 5), (6, 9))
    assert MemoryConfig(insertion="6:9/2:7/2:2").insertions(10) == ((2, 2), (2, 7), (6, 9))
    with pytest.raises(ConfigError, match="insertion='2:5/6:9': block 9 does not exist; the last of 9 blocks is 8"):
        MemoryConfig(insertion="2:5/6:9").insertions(9)
