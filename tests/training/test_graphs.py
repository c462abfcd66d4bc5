"""Passes replayed as CUDA graphs give what passes launched one by one give, to the bit."""

from dataclasses import replace

import pytest

from ultramem.training import train
from ultramem.training.graphs import GraphedPasses

pytestmark = pytest.mark.gpu


def with_memory(config, **fields):
    return replace(config, model=replace(config.model, memory=replace(config.model.memory, **fields)))


@pytest.fixture
def captures(monkeypatch):
    """Whether each capture so far succeeded."""
    results = []
    capture = GraphedPasses._capture

    def spy(self, *arguments):
        results.append(capture(self, *arguments))
        return results[-1]

    monkeypatch.setattr(GraphedPasses, "_capture", spy)
    return results


def both(make_config, metrics_of, system, change=lambda config: config, **options):
    """The metrics of a run with graphs and of one without, but for times."""
    found = []
    for graphs in (False, True):
        config = change(make_config(system, f"graphs-{graphs}", cuda_graphs=graphs, deterministic=True, **options))
        train(config)
        metrics = metrics_of(config.trainer.directory)
        found.append({step: {n: v for n, v in of.items() if "throughput" not in n} for step, of in metrics.items()})
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "rowwise"])
@pytest.mark.parametrize("micro_batch_size", [128, 32])
def test_a_memory(make_config, metrics_of, captures, optimizer, micro_batch_size):
    """Dropout, counting of reads and evaluation included."""

    def change(config):
        return with_memory(config, optimizer=optimizer, value_lr=5e-3)

    options = {"steps": 12, "micro_batch_size": micro_batch_size, "compile": False, "evaluate_interval": 6}
    plain, graphed = both(make_config, metrics_of, "ultramem_v2", change, **options)
    assert captures == [True] * (1 if micro_batch_size == 128 else 2)
    assert graphed == plain


@pytest.mark.parametrize("system", ["dense", "moe", "memory_plus", "ultramem"])
def test_other_systems(make_config, metrics_of, captures, system):
    plain, graphed = both(make_config, metrics_of, system, steps=8, compile=False)
    assert captures == [True]
    assert graphed == plain


@pytest.mark.parametrize("system", ["dense", "ultramem_v2"])
def test_resumed_run_joins_the_curve(make_config, losses_of, captures, system):
    """Of compiled models; the first steps after resuming are launched one by one."""
    whole, parts = (
        make_config(system, name, steps=20, deterministic=True, compile=True) for name in ("whole", "parts")
    )
    train(whole)
    train(parts)
    train(parts, from_checkpoint="step10")
    assert captures == [True] * 3
    assert losses_of(parts.trainer.directory) == losses_of(whole.trainer.directory)


def test_what_cannot_be_captured(make_config, captures, capsys):
    """A loss on singular values waits for the GPU: training goes on, and says so."""
    config = with_memory(make_config(steps=6, compile=False), tucker_penalty_coef=0.1, tucker_rank=3)
    assert train(config).status == "finished"
    assert captures == [False]
    assert "passes cannot be captured as CUDA graphs" in capsys.readouterr().out
