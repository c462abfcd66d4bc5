"""What layers read, against counts in NumPy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ultramem.layers.read_counter import ReadCounter
from ultramem.ops.weighted_lookup.reads import Reads


def record(counter: ReadCounter, rows: Tensor, scores: Tensor, output: Tensor, *, training: bool = True) -> None:
    """What a layer with a window at the table's third row, and so around its end, does."""
    layer: Any = SimpleNamespace(training=training, window_start=torch.tensor(2), table=SimpleNamespace(rows=20))
    counter.observe(layer, Reads((rows + 2) % 20, scores), output)


def test_metrics() -> None:
    generator = torch.Generator().manual_seed(0)
    counter = ReadCounter(10, "cpu")
    reads = [torch.randint(8, (tokens, 6), generator=generator) for tokens in (3, 5)]
    scores = [torch.randn(tokens, 6, 2, generator=generator) for tokens in (3, 5)]
    outputs = [torch.randn(tokens, 4, generator=generator) + 1 for tokens in (3, 5)]
    for recorded in zip(reads, scores, outputs, strict=True):
        record(counter, *recorded)

    counts = np.bincount(torch.cat(reads).flatten().numpy(), minlength=10)
    share = counts[counts > 0] / counts.sum()
    means = torch.cat(scores).mean(-1).numpy()
    assert {name: value.item() for name, value in counter.metrics().items()} == pytest.approx(
        {
            "rows read": (counts > 0).mean(),
            "KL from uniform": (share * np.log(share * 10)).sum(),
            "output std": torch.cat(outputs).numpy().std(),
            "top score": means.max(1).mean(),
            "last score": means.min(1).mean(),
        }
    )


def test_reset_and_no_tokens() -> None:
    counter = ReadCounter(10, "cpu")
    nothing = {"rows read": 0, "KL from uniform": 0, "output std": 0, "top score": 0, "last score": 0}
    assert counter.metrics() == nothing
    record(counter, torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, 1), torch.randn(2, 4))
    assert counter.metrics() != nothing
    counter.reset()
    assert counter.metrics() == nothing
    record(counter, torch.ones(0, 3, dtype=torch.int64), torch.ones(0, 3, 1), torch.randn(0, 4))
    assert counter.metrics() == nothing


def test_every_third_token() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, scores, output = (torch.randn(8, width, generator=generator) for width in (6, 6, 4))
    sampled, whole = ReadCounter(10, "cpu", every=3), ReadCounter(10, "cpu")
    for counter, step in ((sampled, 1), (whole, 3)):
        record(counter, (rows[::step] * 2).abs().long() % 10, scores[::step, :, None], output[::step])
    assert sampled.metrics() == whole.metrics()


def test_uniform_and_concentrated_reads() -> None:
    counter = ReadCounter(8, "cpu")
    record(counter, torch.arange(8).view(2, 4), torch.ones(2, 4, 1), torch.ones(2, 1))
    assert counter.metrics()["KL from uniform"] == 0
    counter.reset()
    record(counter, torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, 1), torch.ones(2, 1))
    assert counter.metrics()["KL from uniform"].item() == pytest.approx(np.log(8))
