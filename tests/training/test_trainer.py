"""The order in which training reads sequences."""

from dataclasses import replace

import numpy as np
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


def test_the_order_depends_on_no_file(token_files, make_config):
    """It is that of OLMo-core, and is not written anywhere."""
    config = replace(make_config(batch_size=32), data=token_files)
    for rank in (None, 0):
        if rank == 0:  # as an earlier version or another run left it
            name = f"global_indices_dataset_size10_epoch1_seed{config.trainer.seed}_v1.npy"
            (config.trainer.directory / "data_order").mkdir(parents=True)
            (config.trainer.directory / "data_order" / name).touch()
        loader = build_data_loader(open_token_data(token_files), config, torch.device("cpu"), None)
        loader.reshuffle(epoch=1)
        expected = np.arange(10, dtype=np.uint32)
        np.random.Generator(np.random.PCG64(config.trainer.seed + 1)).shuffle(expected)
        assert loader.get_global_indices().tolist() == expected.tolist()
        assert not list(config.trainer.directory.glob("*.npy"))
