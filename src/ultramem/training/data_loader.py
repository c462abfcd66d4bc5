"""The batches that training reads."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from olmo_core.data import DataCollator, DataLoaderBase, NumpyFSLDataLoader, NumpyFSLDataset
from olmo_core.distributed.utils import get_rank, get_world_size

from ultramem.runs.config import RunConfig
from ultramem.runs.tokens import TokenData


class DataLoader(NumpyFSLDataLoader):
    """OLMo-core's, with the order of an epoch's sequences in memory: 4 bytes for each, in every process.

    OLMo-core writes it to a file through a memory map, which ends the process when the disk is full, and believes any
    file that it finds there.
    """

    def build_and_save_global_indices(self, in_memory: bool = True) -> None:
        """Make the order, which depends on seed, epoch and number of sequences alone."""
        super().build_and_save_global_indices(in_memory=True)


def build_data_loader(
    data: TokenData, config: RunConfig, device: torch.device, group: dist.ProcessGroup | None
) -> DataLoaderBase:
    """Batches of shuffled training sequences; the order depends on the seed, not on the number of processes."""
    dataset = NumpyFSLDataset(
        *data.train,
        sequence_length=config.data.sequence_length,
        pad_token_id=data.eos_token_id,
        eos_token_id=data.eos_token_id,
        vocab_size=data.vocab_size,
        dtype=np.uint16 if data.dtype == "uint16" else np.uint32,
        include_instance_metadata=False,
    )
    return DataLoader(
        dataset,
        collator=DataCollator(pad_token_id=data.eos_token_id, vocab_size=data.vocab_size),
        global_batch_size=config.trainer.batch_size,
        seed=config.trainer.seed,
        work_dir=config.trainer.directory,  # nothing is written there
        target_device_type=device.type,
        dp_world_size=get_world_size(group),
        dp_rank=get_rank(group),
    )
