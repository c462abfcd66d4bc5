"""Loss, perplexity and bits per byte of a checkpoint on token files."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from ultramem.configuration.field_types import check_least
from ultramem.data.token_sequences import IGNORED, TokenSequences
from ultramem.device import autocast
from ultramem.errors import ConfigError, UltraMemError
from ultramem.evaluation.data import find_data
from ultramem.files.whole_files import write_json
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.runs.checkpoints import find_checkpoint
from ultramem.runs.layout import EVALUATION_NAME
from ultramem.runs.results import LossResult, may_replace

BATCH_TOKENS = 4096  # default for a batch; logits need memory in proportion to it
CHUNK_TOKENS = 2**20  # counted at a time
LARGEST_LOSS = 700.0  # the perplexity is still finite


@dataclass(frozen=True, kw_only=True)
class Evaluation(LossResult):
    """Results of a checkpoint on token files; not saved are the predicted tokens per second and the run directory."""

    tokens_per_second: float
    run: Path

    def save(self, path: Path | None = None) -> Path | None:
        """Write a JSON file, by default the run's `evaluation.json`, which `ultramem report` shows; return its path.

        Nothing is written, and None returned, if these results are not on the run's own held-out data, or its file has
        the same checkpoint on all tokens, and these are on some. Raises UltraMemError if the file cannot be written.
        """
        own = self.run / EVALUATION_NAME
        if path is None and not (self.of_run and may_replace(own, self.checkpoint, self.complete)):
            return None
        write_json(path or own, {field.name: getattr(self, field.name) for field in fields(LossResult)})
        return path or own


def evaluate(
    path: str | os.PathLike[str],
    data: Sequence[Path] = (),
    *,
    split: str | None = None,
    dtype: str | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    device: str = "auto",
    unigram: bool | None = None,
) -> Evaluation:
    """Evaluate a checkpoint, with a progress bar on a terminal.

    Token files are compared with their checksums first, unless the run's `data.verify` is off.

    The token files are cut into sequences that do not overlap and may span several documents. Each token of a sequence
    except the first is predicted once, from the tokens before it in the sequence.

    Args:
        path: run directory, for its latest complete checkpoint, or a checkpoint's own directory.
        data: a directory written by `ultramem tokenize`, or token files; by default the data of the run.
        split: `train` or `heldout`, by default the latter; not for `data` that is token files.
        dtype: for `data` that is token files: `uint16` or `uint32`; by default that of the run's data.
        max_tokens: maximum number of tokens, rounded up to whole sequences, which are spread evenly over the split;
            None for all.
        batch_size: sequences per batch, by default about 4096 tokens; does not change the result.
        sequence_length: tokens per sequence; by default that of training.
        device: `cpu`, `cuda` (in bfloat16 if it has hardware support), or `auto` for CUDA if available.
        unigram: whether to evaluate the unigram model of the train split too, which is read for it; by default if the
            split is known.

    Raises:
        ConfigError: a value is invalid, or does not apply to the data.
        UltraMemError: the checkpoint or the data is missing or damaged, the run's own data has changed, the data was
            made with another tokenizer, or the loss is not finite.
    """
    check_least(1, max_tokens=max_tokens, batch_size=batch_size, sequence_length=sequence_length)
    checkpoint = find_checkpoint(path)
    config = checkpoint.config
    found = find_data(checkpoint, data, split, dtype)
    if unigram and found.manifest is None:
        raise ConfigError("unigram=True: needs a directory written by `ultramem tokenize`; leave it out")
    length = config.data.sequence_length if sequence_length is None else sequence_length
    sequences = TokenSequences(found.files, found.dtype, config.model.vocab_size, length, max_tokens)
    model = checkpoint.load_model(device)
    started = time.perf_counter()
    loss = mean_loss(model, sequences, batch_size or max(1, BATCH_TOKENS // length))
    seconds = time.perf_counter() - started
    unigram_bits = None
    if unigram is not False and found.manifest is not None:
        train = found.manifest.split("train").paths
        if found.verify:
            found.manifest.check(train)
        unigram_bits = found.bits_per_byte(unigram_loss(train, found.files, found.dtype, found.manifest.vocab_size))
    return Evaluation(
        checkpoint=checkpoint.name,
        split=found.name,
        tokens=sequences.predicted_tokens,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=found.bits_per_byte(loss),
        unigram_bits_per_byte=unigram_bits,
        complete=sequences.complete,
        data=found.other,
        tokens_per_second=sequences.predicted_tokens / seconds,
        run=checkpoint.run,
    )


@torch.inference_mode()
def mean_loss(model: MemoryTransformer, sequences: TokenSequences, batch_size: int) -> float:
    """Mean cross-entropy of a model in evaluation mode on the predicted tokens, in nats per token.

    Raises UltraMemError if a token is not in the vocabulary, or the loss is not finite or too large for a perplexity.
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
        raise UltraMemError(
            f"the loss is {loss}, as the training diverged; use an earlier checkpoint: RUN/stepN, and for training "
            "--from-checkpoint stepN"
        )
    return loss


def unigram_loss(train: Sequence[Path], heldout: Sequence[Path], dtype: str, vocab_size: int) -> float:
    """Cross-entropy of held-out tokens under the unigram model of the training tokens, in nats per token.

    A token that occurs n times in N training tokens has the probability (n + 1) / (N + vocab_size). All tokens of the
    files are used. Raises UltraMemError if an id is not below `vocab_size`.
    """
    counts = count_tokens(train, dtype, vocab_size)
    heldout_counts = count_tokens(heldout, dtype, vocab_size)
    log_probabilities = np.log(counts + 1) - np.log(counts.sum() + vocab_size)
    return float(-(heldout_counts * log_probabilities).sum() / heldout_counts.sum())


def count_tokens(paths: Sequence[Path], dtype: str, vocab_size: int) -> NDArray[np.int64]:
    """Count the occurrences of each token in token files, (vocab_size,), int64.

    Raises UltraMemError if an id is too large.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for path in paths:
        tokens = np.memmap(path, mode="r", dtype=np.dtype(dtype).newbyteorder("<"))
        for start in range(0, len(tokens), CHUNK_TOKENS):
            found = np.bincount(tokens[start : start + CHUNK_TOKENS], minlength=vocab_size)
            if len(found) > vocab_size:
                raise UltraMemError(
                    f"token file {path} has id {len(found) - 1}, but the vocabulary has {vocab_size} tokens; "
                    "tokenize again with --overwrite"
                )
            counts += found
    return counts
