"""The tokenizer of a run."""

from __future__ import annotations

from ultramem.data.token_files import load_manifest
from ultramem.data.tokenizers import ChosenTokenizer, load_model_tokenizer
from ultramem.errors import UltraMemError
from ultramem.runs.checkpoints import Checkpoint
from ultramem.runs.layout import TOKENIZER_NAME


def find_tokenizer(checkpoint: Checkpoint) -> ChosenTokenizer:
    """The tokenizer in the run directory; its end-of-text token is as the training data says, if that is still there.

    Raises:
        UltraMemError: the tokenizer is missing or damaged, or has more tokens than the model.
    """
    data, vocab_size = checkpoint.config.data, checkpoint.config.model.vocab_size
    path, eos_id = checkpoint.run / TOKENIZER_NAME, data.eos_token_id
    if not path.is_file():
        raise UltraMemError(f"{path} is missing; copy the {TOKENIZER_NAME} that the training data was made with there")
    if data.directory is not None and data.directory.is_dir():
        eos_id = load_manifest(data.directory).eos_token_id
    return load_model_tokenizer(path, eos_id, vocab_size)
