"""Every preset's parameters against the reported numbers and against a sum over the shapes that the papers give."""

from functools import cache

import pytest

from ultramem.errors import ConfigError
from ultramem.hosts.olmo_core import PRESETS, ModelConfig, ModelStatistics, model_statistics, preset

MILLION = 10**6
FAMILIES = sorted({name.rpartition("_")[2] for name in PRESETS} - {"227m", "1b"})


@cache
def statistics(name: str) -> ModelStatistics:
    return model_statistics(PRESETS[name], sequence_length=4096)


def count_by_hand(config: ModelConfig) -> tuple[int, int]:
    """Total and active parameters without embeddings, from the configuration's numbers alone."""
    d, blocks = config.d_model, config.num_blocks
    attention = 4 * d * d + 2 * (d // config.num_heads)
    total = active = blocks * (attention + 2 * d) + d
    if config.moe is not None:
        expert, router = 3 * d * config.moe.hidden_size, d * config.moe.num_experts
        total += blocks * (router + config.moe.num_experts * expert)
        active += blocks * (router + config.moe.top_k * expert)
        return total, active
    total, active = (count + blocks * 3 * d * config.feed_forward_size for count in (total, active))
    m = config.memory
    if m is None:
        return total, active
    layers = blocks if m.insertion == "all" else len(m.insertion.split("/"))
    rows = layers * m.num_keys**2
    row_width = m.value_dim + m.pre_value_dim
    if m.kind == "pkm":
        layer = 2 * m.heads * m.key_dim * d + 2 * m.heads * m.num_keys * m.key_dim
        table = rows * m.value_dim
    elif m.kind == "memory_plus":
        layer = 2 * m.heads * m.key_dim * d + 2 * m.heads * m.num_keys * m.key_dim + m.key_dim + 2 * d * m.value_dim
        table = m.num_keys**2 * m.value_dim
    else:
        ultramem = m.kind == "ultramem"
        queries = 2 * (m.tucker_rank if m.query_per_rank else 1)
        axis_keys = 2 * m.num_keys if ultramem else int((rows * m.share_ratio) ** 0.5)
        keys = m.heads * 2 * axis_keys * m.key_dim * m.tucker_rank
        cores = m.cores * m.heads * m.tucker_rank**2
        projections = d * (queries * m.key_dim + m.pre_value_dim + m.value_dim * (4 if ultramem else 1))
        layer = projections + 2 * m.key_dim + keys + cores
        table = rows * row_width
    return total + layers * layer + table, active + layers * (layer + m.heads * m.top_k * row_width)


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_the_sum_over_shapes(name: str) -> None:
    config, counted = PRESETS[name], statistics(name)
    total, active = count_by_hand(config)
    embeddings = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    assert (counted.total_without_embeddings, counted.active_without_embeddings) == (total, active)
    assert (counted.total, counted.active) == (total + embeddings, active + embeddings)
    assert counted.embeddings == embeddings


# Reported in millions: active with embeddings and total without at 227M, active and total without at 1B. The published
# counts leave out some of the parameters, the keys for one: those of UltraMemV2-227M are 17 million, in the active
# count as in the total. Hence 7% and 2%. UltraMemV2-1B's total of 6.70 billion is not that of the table of its
# configuration, whose 16 * 528² rows of 768 + 384 alone are 5.14 billion, with 1.08 billion outside: hence 8%.
@pytest.mark.parametrize(
    ("name", "active", "total", "total_tolerance"),
    [
        ("olmoe_227m", 227, 1180, 0.02),
        ("memory_plus_227m", 228, 1190, 0.02),
        ("ultramem_227m", 225, 1180, 0.02),
        ("ultramem_v2_227m", 225, 1180, 0.02),
        ("olmoe_1b", 1070, 6710, 0.02),
        ("ultramem_v2_1b", 1079, 6700, 0.08),
    ],
)
def test_reported_counts(name: str, active: int, total: int, total_tolerance: float) -> None:
    counted = statistics(name)
    own = counted.active if name.endswith("227m") else counted.active_without_embeddings
    assert own == pytest.approx(active * MILLION, rel=0.07)
    assert counted.total_without_embeddings == pytest.approx(total * MILLION, rel=total_tolerance)


def test_dense_twins_of_the_papers() -> None:
    """Their active parameters are the baseline's, which has as many as they have in its chosen experts."""
    for size in ("227m", "1b"):
        dense, sparse = statistics(f"dense_{size}"), statistics(f"olmoe_{size}")
        assert dense.total == dense.active == pytest.approx(sparse.active, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_of_equal_size(family: str) -> None:
    """Equal active parameters of all systems, whether embeddings count or not; equal totals of the sparse ones."""
    members = {name.removesuffix(f"_{family}"): statistics(name) for name in PRESETS if name.endswith(f"_{family}")}
    assert {"dense", "olmoe", "ultramem_v2"} <= members.keys()
    dense = members.pop("dense")
    for system, counted in members.items():
        assert counted.active == pytest.approx(dense.active, rel=0.02), system
        assert counted.active_without_embeddings == pytest.approx(dense.active_without_embeddings, rel=0.02), system
        assert counted.total > 3 * dense.total, system
    totals = [counted.total for counted in members.values()]
    assert max(totals) < 1.08 * min(totals)


def test_families_are_there() -> None:
    assert "medium" in FAMILIES


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"preset='ultramem_v2_227': .*did you mean 'ultramem_v2_227m'\? All: dense_"):
        preset("ultramem_v2_227")
    with pytest.raises(ConfigError, match="preset='': unknown preset"):
        preset("")
    assert preset("ultramem_v2_227m") is PRESETS["ultramem_v2_227m"]
