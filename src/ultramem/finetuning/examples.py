"""Documents as sequences of tokens for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultramem.data.documents import BrokenRecordError, find_sources, read_documents
from ultramem.data.token_sequences import IGNORED
from ultramem.device import autocast
from ultramem.errors import UltraMemError
from ultramem.hosts.transformers.modes import evaluation_mode

Examples = Sequence[dict[str, list[int]]]
Batch = dict[str, Tensor]


def read_texts(paths: Sequence[Path], text_field: str = "text", include: Sequence[str] = ()) -> list[str]:
    """Read the documents of files and directories, as `ultramem tokenize` does.

    Args:
        paths: files and directories.
        text_field: field or column that holds the text.
        include: shell patterns of the files to read from directories; by default text, JSON lines and parquet.

    Raises:
        UltraMemError: a file is missing, a record is broken, or there is no document.
    """
    texts = []
    sources = [source for source in find_sources(paths, include) if source.num_bytes]  # source trees have empty files
    for document in read_documents(sources, text_field):
        if isinstance(document, BrokenRecordError):
            raise document
        texts.append(document.text)
    if not texts:
        raise UltraMemError(f"no document in {', '.join(map(str, paths))}; give other files")
    return texts


def make_examples(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> list[dict[str, list[int]]]:
    """Make examples of at most `sequence_length` tokens; each document ends with the end-of-text token."""
    examples = []
    for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []:
        ids = [*ids, tokenizer.eos_token_id]
        examples += [
            {"input_ids": ids[start : start + sequence_length]} for start in range(0, len(ids), sequence_length)
        ]
    return examples


def collate(examples: Examples) -> Batch:
    """Make a batch, padded on the right to the longest example: ids, mask and labels (examples, tokens)."""
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {
        # Any token can pad: nothing attends to it, and nothing is predicted from it.
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": mask,
        "labels": pad_sequence(ids, batch_first=True, padding_value=IGNORED),
    }


def background_batches(
    examples: Examples, *, batch_tokens: int, sequence_length: int, batches: int, seed: int, device: torch.device
) -> Iterator[Batch]:
    """Yield at most `batches` batches of about `batch_tokens` tokens: different sequences of the joined examples.

    Raises:
        UltraMemError: there are too few tokens for one batch.
    """
    tokens = torch.tensor([token for example in examples for token in example["input_ids"]])
    sequences_per_batch = -(-batch_tokens // sequence_length)
    length = batch_tokens // sequences_per_batch
    sequences = tokens[: len(tokens) // length * length].view(-1, length)
    if len(sequences) < sequences_per_batch:
        raise UltraMemError(
            f"the background has {len(tokens):,} tokens, fewer than one batch of new data ({batch_tokens:,}); give more"
        )
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
    for number in range(min(batches, len(sequences) // sequences_per_batch)):
        chosen = order[number * sequences_per_batch : (number + 1) * sequences_per_batch]
        yield {"input_ids": sequences[chosen].to(device)}


@torch.no_grad()
def mean_loss(model: PreTrainedModel, examples: Examples, batch_size: int) -> float:
    """Mean cross-entropy of the predicted tokens, in nats per token, in evaluation mode."""
    total, predicted = 0.0, 0
    with evaluation_mode(model), autocast(model.device):
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            targets = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            total += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()
            predicted += int((targets != IGNORED).sum())
    return total / max(predicted, 1)
