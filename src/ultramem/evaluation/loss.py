"""Loss, perplexity and bits per byte of a checkpoint on token files."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from ultramem.configuration.field_types import check_least
from ultramem.data.token_sequences import IGNORED, TokenSequences
from ultramem.device import autocast
from ultramem.errors import UltraMemError
from ultramem.evaluation.data import find_data
from ultramem.files.whole_files import read_json_object, write_json
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.runs.checkpoints import find_checkpoint
from ultramem.runs.layout import EVALUATION_NAME
from ultramem.runs.results import LossResult

BATCH_TOKENS = 4096  # default for a batch; logits need memory in proportion to it
LARGEST_LOSS = 700.0  # the perplexity is still finite


@dataclass(frozen=True, kw_only=True)
class Evaluation(LossResult):
    """Results of a checkpoint on token files, with the speed of the evaluation.

    Attributes:
        tokens_per_second: predicted tokens per second; not saved.
        run: run directory; not saved.
    """

    tokens_per_second: float
    run: Path

    def save(self, path: Path | None = None) -> Path | None:
        """Write a JSON file, by default the run's `evaluation.json`, which `ultramem report` shows.

        Returns:
            the file; None if nothing was written because the run's own file already has the same checkpoint on all
            tokens, and these results are on some of them.

        Raises:
            UltraMemError: the file cannot be written.
        """
        own = self.run / EVALUATION_NAME
        if path is None and not self.complete:
            earlier = read_json_object(own)
            if earlier.get("checkpoint") == self.checkpoint and earlier.get("complete", True):
                return None
        write_json(path or own, {field.name: getattr(self, field.name) for field in fields(LossResult)})
        return path or own


def evaluate(
    path: str | os.PathLike[str],
    data: Sequence[Path] = (),
    *,
    split: str = "heldout",
    dtype: str | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    device: str = "auto",
    unigram: bool = True,
) -> Evaluation:
    """Evaluate a checkpoint, with a progress bar on a terminal.

    The token files are cut into sequences that do not overlap and may span several documents. Each token of a sequence
    except the first is predicted once, from the tokens before it in the sequence.

    Args:
        path: run directory, for its latest complete checkpoint, or a checkpoint's own directory.
        data: a directory written by `ultramem tokenize`, or token files; by default the data of the run.
        split: `train` or `heldout`; not used for token files.
        dtype: dtype of token files, `uint16` or `uint32`; by default that of the run's data.
        max_tokens: maximum number of tokens, rounded up to whole sequences, which are spread evenly over the split;
            None for all.
        batch_size: sequences per batch, by default about 4096 tokens; does not change the result.
        sequence_length: tokens per sequence; by default that of training.
        device: `cpu`, `cuda` (in bfloat16 if it has hardware support), or `auto` for CUDA if available.
        unigram: whether to evaluate the unigram model of the train split too, which is read for it.

    Raises:
        ConfigError: a value is invalid.
        UltraMemError: the checkpoint or the data is missing or damaged, or the loss is not finite.
    """
    checkpoint = find_checkpoint(path)
    config = checkpoint.config
    found = find_data(checkpoint, data, split, dtype)
    length = config.data.sequence_length if sequence_length is None else sequence_length
    sequences = TokenSequences(found.files, found.dtype, config.model.vocab_size, length, max_tokens)
    check_least(1, batch_size=batch_size)
    model = checkpoint.load_model(device)
    started = time.perf_counter()
    loss = mean_loss(model, sequences, batch_size or max(1, BATCH_TOKENS // length))
    seconds = time.perf_counter() - started
    return Evaluation(
        checkpoint=checkpoint.name,
        split=found.name,
        tokens=sequences.predicted_tokens,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=found.bits_per_byte(loss),
        unigram_bits_per_byte=found.bits_per_byte(found.unigram_loss() if unigram else None),
        complete=sequences.complete,
        tokens_per_second=sequences.predicted_tokens / seconds,
        run=checkpoint.run,
    )


@torch.inference_mode()
def mean_loss(model: MemoryTransformer, sequences: TokenSequences, batch_size: int) -> float:
    """Mean cross-entropy of the predicted tokens, in nats per token.

    Args:
        model: model in evaluation mode.
        sequences: sequences of tokens.
        batch_size: sequences per batch.

    Raises:
        UltraMemError: a token is not in the vocabulary, or the loss is not finite or too large for a perplexity.
    """
    device, console = model.device, Console(stderr=True)
    console.quiet = not console.is_terminal  # else it gets an empty line at the end
    total = torch.zeros((), dtype=torch.float64, device=device)
    for inputs, labels in track(
        sequences.batches(batch_size),
        description="evaluating",
        total=-(-len(sequences) // batch_size),
        console=console,
        disable=console.quiet,
    ):
        with autocast(device):
            output = model(inputs, labels=labels, ignore_index=IGNORED, loss_reduction="none", return_logits=False)
        total += output.ce_loss.double().sum()
    loss = float(total) / sequences.predicted_tokens
    if not loss <= LARGEST_LOSS:
        raise UltraMemError(f"the loss is {loss}, as the training diverged; use an earlier checkpoint")
    return loss
