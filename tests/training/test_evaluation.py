"""Dividing held-out sequences between processes, and what comes of their losses."""

import numpy as np
import pytest
import torch

from ultramem.data.token_sequences import TokenSequences
from ultramem.training.evaluation import HeldoutBatches, HeldoutEvaluator


def batches_of(sequences, batch_size, rank, processes):
    batches = HeldoutBatches(sequences, batch_size, None)
    batches.rank, batches.processes = rank, processes
    return list(batches), len(batches)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_the_sequences(token_files, processes):
    sequences = TokenSequences(token_files.heldout_files, "uint32", 100, 16)  # 16, 16, 16 and 2 tokens
    tokens, counts = [], set()
    for rank in range(processes):
        batches, count = batches_of(sequences, 3, rank, processes)
        counts |= {count, len(batches)}
        for batch in batches:
            tokens += batch["input_ids"][batch["label_mask"]].tolist()
    assert sorted(tokens) == list(range(50))
    assert len(counts) == 1


def test_metrics(token_files):
    sequences = TokenSequences(token_files.heldout_files, "uint32", 100, 16)
    (first, second), _ = batches_of(sequences, 3, 0, 1)
    evaluator = HeldoutEvaluator(HeldoutBatches(sequences, 3, None), 2.5, torch.device("cpu"), None)
    losses = torch.zeros(3, 16)
    losses[:, :15] = 1.0  # of 45 tokens
    evaluator.update_metrics(first, losses, None)
    losses = torch.zeros(3, 16)
    losses[0, 0] = 24.0  # of the one that the last sequence predicts
    evaluator.update_metrics(second, losses, None)
    metrics = {name: float(value) for name, value in evaluator.compute_metrics().items()}
    mean = (45 + 24) / 46
    assert metrics == pytest.approx(
        {"CE loss": mean, "perplexity": np.exp(mean), "bits per byte": mean / np.log(2) / 2.5}
    )
