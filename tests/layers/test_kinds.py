"""A kind of memory is one file: here is a tiny one, and all that there is to say about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ultramem import ConfigError, Memory, MemoryConfig
from ultramem.hosts.olmo_core import ModelConfig
from ultramem.layers import KINDS
from ultramem.layers.initial_values import HostScheme
from ultramem.layers.memory_layer import MemoryLayer
from ultramem.tables.filling import normal
from ultramem.tables.layout import TableLayout, whole_tables
from ultramem.tables.table import Table


class FlatMemory(MemoryLayer):
    """One key for each row, all of them scored; a softmax over the best."""

    defaults = {"value_lr": 2e-3}
    unused = {"axis_top_k": "has no axes", "norm_eps": "has no norms"}

    def __init__(self, config: MemoryConfig, d_model: int, table: Table, **options: Any) -> None:
        super().__init__(config, d_model, table, **options)
        self.keys = nn.Parameter(torch.empty(self.axis_keys**2, config.key_dim))
        self.output_proj = nn.Linear(config.value_dim, d_model, bias=False)

    @classmethod
    def queries_per_token(cls, config: MemoryConfig) -> int:
        return 1

    @classmethod
    def layout(cls, config: MemoryConfig, num_layers: int) -> TableLayout:
        return whole_tables(config.num_keys, num_layers, shared=True)

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        scores, indices = (queries.squeeze(1) @ self.keys.T).topk(self.config.top_k)
        return scores.softmax(-1).unsqueeze(-1), indices

    def project(self, looked_up: Tensor, x: Tensor) -> Tensor:
        return self.output_proj(looked_up)

    def init_retrieval(self, scheme: HostScheme, generator: torch.Generator) -> float:
        normal(self.keys, 1e-3, generator)
        return 1 / self.config.top_k  # nearly equal weights

    def init_output(self, scheme: HostScheme, generator: torch.Generator) -> float:
        return self.init_projection(self.output_proj.weight, scheme, generator)

    def init_published(self, generator: torch.Generator) -> None:
        raise NotImplementedError

    def metrics(self) -> dict[str, Tensor]:
        return {"key norm": self.keys.norm()}


@pytest.fixture(autouse=True)
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "flat", FlatMemory)


def config(**options: Any) -> MemoryConfig:
    return MemoryConfig(kind="flat", num_keys=6, key_dim=8, value_dim=32, top_k=4, **options)


def test_its_defaults_and_what_it_has_no_use_for() -> None:
    assert config(optimizer="adamw").value_lr == 2e-3
    with pytest.raises(ConfigError, match="axis_top_k=8: flat has no axes; leave it out, or choose kind='ultramem' or"):
        config(axis_top_k=8)
    with pytest.raises(ConfigError, match=r"kind='flut': must be one of pkm, .*, flat"):
        MemoryConfig(kind="flut")


def test_its_layers_compute_learn_and_report() -> None:
    memory = Memory(config(), 16, 3)
    memory.track_usage()
    x, (layer, *_) = torch.randn(5, 16), memory.layers
    y = layer(x)
    weights, rows = layer.retrieve(layer.queries(x))
    torch.testing.assert_close(y, layer.output_proj((weights * memory.table.values[rows]).sum(1)))
    y.square().mean().backward()
    assert memory.table.values.grad is not None
    memory.refresh()
    metrics = memory.usage_metrics()
    assert {"layer 02/rows read", "layer 00/key norm"} <= metrics.keys()
    assert metrics["layer 00/key norm"] == layer.keys.norm()


def test_its_output_starts_as_large_as_the_feed_forward() -> None:
    scheme = HostScheme.swiglu(64, 128, 0.05, 0.02)
    memory = Memory(MemoryConfig(kind="flat", num_keys=40, key_dim=8, value_dim=64, top_k=8), 64, 2, scheme=scheme)
    for layer in memory.layers:
        assert layer(torch.randn(256, 64)).std().item() == pytest.approx(scheme.feed_forward_std, rel=0.25)


def test_the_training_host_takes_it() -> None:
    model = ModelConfig(16, 2, 2, 24, 64, memory=config()).build("cpu")
    model.init_weights(device=torch.device("cpu"))
    assert model(torch.randint(64, (2, 5))).isfinite().all()
