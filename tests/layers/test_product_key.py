"""PKM and Memory+ against whole grids in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ultramem import ConfigError, Memory, MemoryConfig
from ultramem.layers.memory_layer import balance_loss

D_MODEL = 6


def build(kind: Any, **options: Any) -> Memory:
    config = MemoryConfig(kind=kind, num_keys=4, key_dim=5, value_dim=D_MODEL, top_k=6, **options)
    return Memory(config, D_MODEL, 2, dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("kind", ["pkm", "memory_plus"])
def test_equals_the_whole_grid(kind: str, heads: int) -> None:
    memory = build(kind, heads=heads)
    layer = memory.layers[1]
    x = torch.randn(3, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if kind == "memory_plus":
        layer.query_norm.weight.data.uniform_(0.5, 2)
    p = {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}
    values = layer.table.values.detach().numpy()
    for one, output in zip(x.numpy(), layer(x).detach().numpy(), strict=True):
        queries = (p["query_proj.weight"] @ one).reshape(heads, 2, -1)
        if kind == "memory_plus":
            queries = queries / np.sqrt((queries**2).mean(-1, keepdims=True) + 1e-5) * p["query_norm.weight"]
        total = np.zeros(D_MODEL)
        for head in range(heads):
            rows, columns = (p["keys"][head, axis] @ queries[head, axis] for axis in (0, 1))
            grid = (rows[:, None] + columns[None, :]).flatten()
            best = np.argsort(-grid)[:6]
            weights = np.exp(grid[best]) / np.exp(grid[best]).sum()
            total += weights @ values[best]
        if kind == "memory_plus":
            gate = p["gate_proj.weight"] @ one
            total = p["output_proj.weight"] @ (total * gate / (1 + np.exp(-gate)))
        np.testing.assert_allclose(output, total, rtol=1e-9, atol=1e-12)


def test_pkm_owns_its_tables_and_memory_plus_shares_one() -> None:
    pkm, memory_plus = build("pkm"), build("memory_plus")
    assert pkm.table is None
    assert pkm.layers[0].table is not pkm.layers[1].table
    assert memory_plus.table is memory_plus.layers[0].table is memory_plus.layers[1].table
    assert sum(name.endswith("values") for name, _ in pkm.named_parameters()) == 2
    assert [name for name, _ in memory_plus.named_parameters() if name.endswith("values")] == ["table.values"]


def test_pkm_values_are_as_wide_as_the_model() -> None:
    with pytest.raises(
        ConfigError, match="value_dim=128: must be d_model=6, as pkm adds values to the residual stream"
    ):
        Memory(MemoryConfig(kind="pkm"), D_MODEL, 1)


def test_balance_loss_is_1_for_a_uniform_choice_and_more_otherwise() -> None:
    uniform = torch.eye(4).view(4, 1, 4) * 50  # token i chooses key i
    assert balance_loss(uniform, 1).item() == pytest.approx(1)
    one_key = torch.zeros(4, 1, 4)
    one_key[..., 2] = 50
    assert balance_loss(one_key, 1).item() == pytest.approx(4)


def test_balance_loss_knows_the_heads_apart() -> None:
    """Each head always chooses its own one key: as uneven as can be, though two keys' numbers are used equally."""
    scores = torch.zeros(5, 2, 2)
    scores[:, 0, 0] = scores[:, 1, 1] = 50
    assert balance_loss(scores, 1).item() == pytest.approx(2)


def test_balance_loss_of_no_tokens_and_of_more_candidates_than_keys() -> None:
    assert balance_loss(torch.zeros(0, 2, 3), 2) == 0
    assert balance_loss(torch.randn(4, 2, 3), 99).item() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["pkm", "memory_plus"])
def test_auxiliary_loss(kind: str) -> None:
    memory = build(kind, balance_coef=0.5)
    layer = memory.layers[0]
    layer(torch.randn(7, D_MODEL, dtype=torch.float64))
    # Six of at most four keys: every key is chosen on both axes, so each axis' loss is 1.
    assert layer.auxiliary_loss is not None
    assert layer.auxiliary_loss.item() == pytest.approx(0.5 * 2)
    layer.eval()
    layer(torch.randn(7, D_MODEL, dtype=torch.float64))
    assert layer.auxiliary_loss is None
