"""What layers read, against counts in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ultramem.layers.usage import Usage


def test_metrics() -> None:
    generator = torch.Generator().manual_seed(0)
    usage = Usage(10, "cpu")
    reads = [torch.randint(8, (tokens, 6), generator=generator) for tokens in (3, 5)]
    scores = [torch.randn(tokens, 6, 2, generator=generator) for tokens in (3, 5)]
    outputs = [torch.randn(tokens, 4, generator=generator) + 1 for tokens in (3, 5)]
    for recorded in zip(reads, scores, outputs, strict=True):
        usage.record(*recorded)

    counts = np.bincount(torch.cat(reads).flatten().numpy(), minlength=10)
    share = counts[counts > 0] / counts.sum()
    means = torch.cat(scores).mean(-1).numpy()
    assert {name: value.item() for name, value in usage.metrics().items()} == pytest.approx(
        {
            "rows read": (counts > 0).mean(),
            "KL from uniform": (share * np.log(share * 10)).sum(),
            "output std": torch.cat(outputs).numpy().std(),
            "top score": means.max(1).mean(),
            "last score": means.min(1).mean(),
        }
    )


def test_reset_and_no_tokens() -> None:
    usage = Usage(10, "cpu")
    nothing = {"rows read": 0, "KL from uniform": 0, "output std": 0, "top score": 0, "last score": 0}
    assert usage.metrics() == nothing
    usage.record(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, 1), torch.randn(2, 4))
    assert usage.metrics() != nothing
    usage.reset()
    assert usage.metrics() == nothing
    usage.record(torch.ones(0, 3, dtype=torch.int64), torch.ones(0, 3, 1), torch.randn(0, 4))
    assert usage.metrics() == nothing


def test_uniform_and_concentrated_reads() -> None:
    usage = Usage(8, "cpu")
    usage.record(torch.arange(8).view(2, 4), torch.ones(2, 4, 1), torch.ones(2, 1))
    assert usage.metrics()["KL from uniform"] == 0
    usage.reset()
    usage.record(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, 1), torch.ones(2, 1))
    assert usage.metrics()["KL from uniform"].item() == pytest.approx(np.log(8))
