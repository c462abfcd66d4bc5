"""The order in which training reads sequences."""

from dataclasses import replace

import torch

from ultramem.runs.tokens import open_token_data
from ultramem.training.trainer import build_data_loader


def test_each_sequence_comes_once_an_epoch(token_files, make_config):
    config = replace(make_config(batch_size=32), data=token_files)
    loader = build_data_loader(open_token_data(token_files), config, torch.device("cpu"), None)
    loader.reshuffle(epoch=1)
    first_tokens = [int(row[0]) for batch in loader for row in batch["input_ids"]]
    expected = [*range(0, 96, 16), *range(0, 64, 16)]  # of both files; the ends are left out
    assert sorted(first_tokens) == sorted(expected)
    assert first_tokens != expected
