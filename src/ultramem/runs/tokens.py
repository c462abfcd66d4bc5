"""The tokens of a run: where they are, the training batches, and the held-out evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from olmo_core.data import DataLoaderBase, NumpyDataLoaderConfig, NumpyFSLDataset
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.eval import Evaluator
from torch import Tensor

from ultramem.data.token_files import Manifest, check_token_files, load_manifest
from ultramem.data.token_windows import TokenWindows
from ultramem.errors import UltraMemError

if TYPE_CHECKING:
    from ultramem.runs.config import DataConfig, RunConfig


@dataclass(frozen=True)
class TokenData:
    """Token files and what is known about them.

    Attributes:
        train: files to train on.
        heldout: files to evaluate on; may be none.
        dtype: `uint16` or `uint32`.
        vocab_size: one more than the largest token id.
        eos_token_id: the token that ends a document.
        train_bytes_per_token: UTF-8 bytes of text for each training token; None if not known.
        heldout_bytes_per_token: the same of the held-out tokens.
        tokenizer: the `tokenizer.json`, or None if not known.
    """

    train: tuple[Path, ...]
    heldout: tuple[Path, ...]
    dtype: str
    vocab_size: int
    eos_token_id: int
    train_bytes_per_token: float | None = None
    heldout_bytes_per_token: float | None = None
    tokenizer: Path | None = None


def open_token_data(config: DataConfig) -> TokenData:
    """Find the files that a configuration names.

    Raises:
        UltraMemError: the directory or a file in it is missing, unreadable or of the wrong size.
    """
    if config.directory is None:
        assert config.dtype is not None
        assert config.vocab_size is not None
        assert config.eos_token_id is not None
        return TokenData(config.train_files, config.heldout_files, config.dtype, config.vocab_size, config.eos_token_id)
    manifest, *others = (load_manifest(directory) for directory in (config.directory, *config.more_directories))
    for other in others:
        if other.eos_token_id != manifest.eos_token_id or not _same_tokenizer(other, manifest):
            raise UltraMemError(
                f"data.more_directories: {other.directory} has another tokenizer than {manifest.directory}; write "
                f"it with --tokenizer {manifest.tokenizer_path}"
            )
    train, heldout = [part.split("train") for part in (manifest, *others)], manifest.splits["heldout"]
    return TokenData(
        tuple(path for split in train for path in split.paths),
        tuple(heldout.paths),
        manifest.dtype,
        manifest.vocab_size,
        manifest.eos_token_id,
        sum(split.bytes for split in train) / sum(split.tokens for split in train),
        heldout.bytes / heldout.tokens if heldout.tokens else None,
        manifest.tokenizer_path,
    )


def _same_tokenizer(first: Manifest, second: Manifest) -> bool:
    return first.tokenizer_path.read_bytes() == second.tokenizer_path.read_bytes()


def check_token_data(data: TokenData, config: RunConfig) -> None:
    """Check that the files can be read, suit the model and suffice for a batch.

    Raises:
        UltraMemError: a file is missing or damaged, the vocabulary is larger than the model's, or there are too few
            tokens.
    """
    if data.vocab_size > config.model.vocab_size:
        raise UltraMemError(
            f"model.vocab_size={config.model.vocab_size}: the data has {data.vocab_size} tokens in its vocabulary; "
            "raise it to that, or leave it out"
        )
    counts = check_token_files(data.train, data.dtype, data.vocab_size)
    if data.heldout:
        check_token_files(data.heldout, data.dtype, data.vocab_size)
    length = config.data.sequence_length
    usable = sum(count // length for count in counts) * length
    if usable < config.trainer.batch_size:
        raise UltraMemError(
            f"trainer.batch_size={config.trainer.batch_size}: the training data has only {usable} tokens in whole "
            f"sequences of {length}; lower it, or data.sequence_length, or tokenize more text"
        )


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


class HeldoutBatches:
    """This process's share of the held-out windows, in batches; all processes have the same number of batches.

    Args:
        windows: all windows.
        batch_size: windows of a batch.
        group: processes that share the windows.
    """

    def __init__(self, windows: TokenWindows, batch_size: int, group: dist.ProcessGroup | None) -> None:
        self.windows, self.batch_size = windows, batch_size
        self.rank, self.processes = get_rank(group), get_world_size(group)

    def __len__(self) -> int:
        """Batches of each process."""
        return math.ceil(math.ceil(len(self.windows) / self.processes) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """`input_ids` (batch size, length), int64, and `label_mask`, false where there is no token to predict."""
        own = islice(self.windows, self.rank, None, self.processes)
        for _ in range(len(self)):
            tokens = torch.zeros(self.batch_size, self.windows.length, dtype=torch.int64)
            mask = torch.zeros_like(tokens, dtype=torch.bool)
            for row, window in enumerate(islice(own, self.batch_size)):
                tokens[row, : len(window)] = torch.from_numpy(window.astype(np.int64))
                mask[row, : len(window)] = True
            yield {"input_ids": tokens, "label_mask": mask}


class HeldoutEvaluator(Evaluator):
    """Mean loss on held-out windows: `CE loss` (nats per token), `perplexity`, and `bits per byte` if known.

    Args:
        batches: the windows.
        bytes_per_token: UTF-8 bytes of text for each token, or None.
        device: of the model.
        group: processes that share the windows.
    """

    def __init__(
        self,
        batches: HeldoutBatches,
        bytes_per_token: float | None,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(name="heldout", batches=batches, device=device)
        self.bytes_per_token, self.group = bytes_per_token, group
        self.reset_metrics()

    def update_metrics(self, batch: dict[str, Any], ce_loss: Tensor | None, logits: Tensor | None) -> None:
        """Add one batch; `ce_loss` (batch size, length) is 0 where there was nothing to predict."""
        del logits
        assert ce_loss is not None
        predicted = batch["label_mask"][:, 1:].sum().to(self._sums)
        self._sums += torch.stack([ce_loss.sum(dtype=self._sums.dtype).to(self._sums), predicted])

    def compute_metrics(self) -> dict[str, Tensor]:
        """The metrics over all processes' windows."""
        if dist.is_initialized():
            dist.all_reduce(self._sums, group=self.group)
        loss = self._sums[0] / self._sums[1]
        metrics = {"CE loss": loss, "perplexity": loss.exp()}
        if self.bytes_per_token is not None:
            metrics["bits per byte"] = loss / math.log(2) / self.bytes_per_token
        return metrics

    def reset_metrics(self) -> None:
        """Start anew."""
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, predicted tokens
