"""Loading and saving the model that is fine-tuned."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ultramem.data.tokenizers import plain_errors
from ultramem.errors import UltraMemError
from ultramem.hosts.transformers import load_memory
from ultramem.hosts.transformers.files import load_model_file


def load_model_and_tokenizer(
    directory: Path, memory: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, with parameters in float32, and its tokenizer.

    Args:
        directory: transformers directory.
        memory: directory written by `save_memory`, whose memory is attached, or None.

    Raises:
        UltraMemError: a file is missing or damaged, or the tokenizer does not fit or has no end-of-text token.
    """
    model = load_model_file(directory, torch.float32)
    with plain_errors(f"the tokenizer in {directory} cannot be loaded", "put it there"):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UltraMemError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, but the model {rows}; put its own there"
        )
    if tokenizer.eos_token_id is None:
        raise UltraMemError(f"the tokenizer in {directory} has no end-of-text token; set its eos_token there")
    if memory is not None:
        load_memory(model, memory).float()
    return model, tokenizer
