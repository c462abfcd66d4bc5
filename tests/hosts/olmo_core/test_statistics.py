"""Costs of tiny models against counts made by hand."""

from typing import Any

import pytest

from ultramem import MemoryConfig
from ultramem.hosts.olmo_core import ModelConfig, MoEConfig, model_statistics

D, BLOCKS, HEADS, HIDDEN, VOCABULARY, LENGTH = 16, 2, 2, 24, 32, 9
SIZES: dict[str, Any] = {
    "d_model": D,
    "num_blocks": BLOCKS,
    "num_heads": HEADS,
    "feed_forward_size": HIDDEN,
    "vocab_size": VOCABULARY,
}
ATTENTION = 4 * D * D + 2 * (D // HEADS)  # with the gains of the query and key norms, which all heads share
FEED_FORWARD = 3 * D * HIDDEN
EMBEDDING = VOCABULARY * D
OTHER_GAINS = BLOCKS * 2 * D  # of the norms before the sublayers; OLMo-core counts no operations for them
FINAL_GAINS = D
# A token attends to 1, 2, ..., 9 tokens, 5 in the mean: a product of queries with keys, and one with values.
SCORES = 2 * (2 * 5 * D)

EXPERTS = MoEConfig(hidden_size=8, num_experts=6, top_k=2)
ROUTER, EXPERT = 6 * D, 3 * D * 8

# Two layers that share a table of 2 * 25 rows; half of it, 5 * 5 rows, is in reach of each.
MEMORY = MemoryConfig(
    num_keys=5, key_dim=4, value_dim=6, pre_value_dim=3, top_k=7, heads=2, cores=3, tucker_rank=2, share_ratio=0.5
)
KEYS, QUERIES = 2 * 2 * 5 * 4 * 2, 2 * 2 * 4 * D  # heads, axes, keys, key_dim, rank; axes, rank, key_dim
LAYER = QUERIES + KEYS + 3 * 2 * 2 * 2 + 2 * 4 + 3 * D + 6 * D
ROW, ROWS_READ, TABLE_ROWS = 6 + 3, 2 * 7, 2 * 25

# For each system: parameters beside attention, norms and embeddings; those of them that a token uses.
SYSTEMS = {
    "dense": ({}, BLOCKS * FEED_FORWARD, BLOCKS * FEED_FORWARD),
    "moe": ({"moe": EXPERTS}, BLOCKS * (ROUTER + 6 * EXPERT), BLOCKS * (ROUTER + 2 * EXPERT)),
    "ultramem_v2": (
        {"memory": MEMORY},
        BLOCKS * (FEED_FORWARD + LAYER) + TABLE_ROWS * ROW,
        BLOCKS * (FEED_FORWARD + LAYER + ROWS_READ * ROW),
    ),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("system", SYSTEMS)
def test_counts(system: str, tied: bool) -> None:
    options, total, active = SYSTEMS[system]
    counted = model_statistics(ModelConfig(**SIZES | options, tie_embeddings=tied), LENGTH)
    shared = BLOCKS * ATTENTION + OTHER_GAINS + FINAL_GAINS
    assert counted.embeddings == (EMBEDDING if tied else 2 * EMBEDDING)
    assert counted.total_without_embeddings == shared + total
    assert counted.active_without_embeddings == shared + active
    assert counted.total == shared + total + counted.embeddings
    assert counted.active == shared + active + counted.embeddings

    # An addition and a multiplication for each weight; the embedding is looked up, the output layer multiplied.
    weights = BLOCKS * ATTENTION + active + FINAL_GAINS + EMBEDDING
    assert counted.flops_per_token == 2 * weights + BLOCKS * SCORES

    # Two bytes for each weight that a token uses: all of the output layer, one row of the embedding.
    assert counted.bytes_per_token == 2 * (shared + active + EMBEDDING + D)


def test_skip_layer_insertion_costs_one_layer() -> None:
    """What a layer costs does not depend on where its output is added."""
    near, far = (
        model_statistics(ModelConfig(**SIZES, memory=MemoryConfig(num_keys=5, top_k=7, insertion=pairs)), LENGTH)
        for pairs in ("0:0", "0:1")
    )
    assert near == far
    none = model_statistics(ModelConfig(**SIZES, memory=MemoryConfig(insertion="none")), LENGTH)
    assert none == model_statistics(ModelConfig(**SIZES), LENGTH)


def test_only_attention_depends_on_the_length() -> None:
    short, long = (model_statistics(ModelConfig(**SIZES, memory=MEMORY), length) for length in (LENGTH, 2 * LENGTH + 1))
    assert long.flops_per_token - short.flops_per_token == BLOCKS * SCORES
    assert long.bytes_per_token == short.bytes_per_token
