"""The batches that training reads."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from olmo_core.data import DataLoaderBase, NumpyDataLoaderConfig, NumpyFSLDataset

from ultramem.runs.config import RunConfig
from ultramem.runs.tokens import TokenData


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
    return NumpyDataLoaderConfig(
        global_batch_size=config.trainer.batch_size,
        seed=config.trainer.seed,
        work_dir=str(config.trainer.directory / "data_order"),
        target_device_type=device.type,
    ).build(dataset, dp_process_group=group)
